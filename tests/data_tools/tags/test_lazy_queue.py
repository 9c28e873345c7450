"""What lazy greedy keeps its candidates in: groups of equal instances, and a ladder of their bounds."""

import numpy as np
import pytest
from tag_pools import random_pool

from megatron_ksa.data_tools.tags import alike
from megatron_ksa.data_tools.tags import greedy as greedy_module
from megatron_ksa.data_tools.tags.alike import Alike
from megatron_ksa.data_tools.tags.constraints import Ledger, Limit, Rules
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.ladder import Ladder
from megatron_ksa.data_tools.tags.objective import Coverage


def copies(kinds: int, of_each: int) -> Coverage:
    """Instances that are copies of a few, mixed."""
    some = random_pool(3, instances=kinds, nodes=40).coverage()
    return some.take(np.random.default_rng(0).permutation(np.arange(kinds * of_each) % kinds))


def test_a_choice_among_copies_costs_few_gains():
    """Each choice among k equal instances computed k gains, since it made the bounds of all others stale."""
    coverage = copies(20, 200)
    lazy, plain = greedy(coverage, 300), greedy(coverage, 300, lazy=False)
    np.testing.assert_array_equal(lazy.chosen, plain.chosen)
    np.testing.assert_array_equal(lazy.gains, plain.gains)
    assert lazy.evaluations <= 2 * (300 + coverage.instances)


@pytest.mark.parametrize("tie", [False, True])
def test_windows_stay_small(monkeypatch, tie):
    """A window grew to the whole pool after the first choice, since that makes every bound stale, and stayed so: at two
    million instances each further choice searched all of them."""
    pool = random_pool(1, instances=4000, nodes=3000)
    if tie:
        pool.strength[:] = 1.0
    coverage, searched = pool.coverage(), []
    best = greedy_module._best

    def counted(progress, heads, window, slack):
        searched.append(len(heads))
        return best(progress, heads, window, slack)

    monkeypatch.setattr(greedy_module, "_best", counted)
    found = greedy(coverage, 400, window=16)
    monkeypatch.undo()
    np.testing.assert_array_equal(found.chosen, greedy(coverage, 400, lazy=False).chosen)
    assert sum(searched) < found.evaluations + 16 * len(searched)
    assert len(searched) < 400 + found.evaluations / 8


@pytest.mark.parametrize("window", [1, 5, 8192])
@pytest.mark.parametrize("alone", ["cost", "limits", "first", "near the pool's size", "all"])
def test_lazy_and_plain_greedy_choose_the_same_of_copies(window, alone):
    for seed in range(6):
        generator, coverage = np.random.default_rng(seed), copies(7 + seed, 9)
        count = coverage.instances
        cost = generator.integers(1, 6, count) if alone in ("cost", "all") else None
        budget = {"near the pool's size": count - 2}.get(alone, count // 3)
        limits: tuple[Limit, ...] = ()
        if alone in ("limits", "all"):
            one, other = generator.integers(0, 3, (2, count))
            limits = (Limit(one == 0, most=budget / 6), Limit(one == 1, least=budget / 3), Limit(other == 1, most=4.0))
        first = generator.permutation(count)[:5] if alone == "first" else np.empty(0, np.int64)
        if alone == "all":
            first = np.argsort(cost)[:2]
        rules = Rules(first, limits)
        lazy = greedy(coverage, budget, cost, window=window, rules=rules)
        plain = greedy(coverage, budget, cost, lazy=False, rules=rules)
        np.testing.assert_array_equal(lazy.chosen, plain.chosen)
        np.testing.assert_array_equal(lazy.gains, plain.gains)


def test_groups_hold_equal_instances_the_cheapest_first(monkeypatch):
    coverage = copies(12, 8)
    count = coverage.instances
    generator = np.random.default_rng(1)
    cost, member = generator.integers(1, 4, count).astype(float), generator.random(count) < 0.5
    rows = np.hstack([coverage.mass.toarray(), member[:, None]])
    group = np.unique(rows, axis=0, return_inverse=True)[1]
    in_order = np.lexsort((np.arange(count), cost, group))
    wanted = sorted(in_order[group[in_order] == number].tolist() for number in range(group.max() + 1))
    groups = Alike(coverage.mass, cost, (Limit(member),))
    assert (np.diff(groups.head) > 0).all()
    taken: dict[int, list[int]] = {number: [] for number in range(len(groups.head))}
    usable = np.ones(count, bool)
    for _ in range(count):
        left = np.flatnonzero(groups.advance(np.arange(len(groups.head)), lambda rows: usable[rows]))
        for number in left:
            taken[number].append(int(groups.head[number]))
            usable[groups.head[number]] = False
    assert sorted(taken.values()) == wanted
    # Hashes that collide part what is equal, at worst; they never join what differs.
    monkeypatch.setattr(alike, "_hashes", lambda mass, limits: np.zeros(mass.shape[0], np.uint64))
    np.testing.assert_array_equal(greedy(coverage, 40, cost).chosen, greedy(coverage, 40, cost, lazy=False).chosen)


def test_a_ladder_gives_the_largest_bounds_first():
    generator = np.random.default_rng(0)
    bound = generator.integers(0, 200, 3000).astype(float)
    ladder, left = Ladder(bound), set(range(3000))
    while left:
        size = int(generator.integers(1, 40))
        entries, outside = ladder.take(size)
        assert len(set(entries.tolist())) == len(entries) >= min(size, len(left)) and left.issuperset(entries.tolist())
        others = np.array(sorted(left.difference(entries.tolist())), np.int64)
        assert outside == bound[others].max(initial=-np.inf) <= bound[entries].min()
        gone = entries[: len(entries) // 2 + 1]
        left.difference_update(gone.tolist())
        back = entries[len(entries) // 2 + 1 :]
        bound[back] -= generator.integers(0, 100, len(back))
        ladder.put(back)
    assert ladder.take(3)[1] == -np.inf and not len(ladder.take(3)[0])


def test_the_ledger_closes_what_bounds_leave_no_room_for():
    """Of an instance dearer than a quota every choice looked through the pool."""
    for seed in range(40):
        generator = np.random.default_rng(seed)
        cost, kind = generator.integers(1, 9, 60).astype(float), generator.integers(0, 4, 60)
        budget = 120.0
        limits = (Limit(kind == 0, most=20.0), Limit(kind == 1, 30.0), Limit(kind == 2, 10.0, 15.0))
        ledger, chosen = Ledger(Rules(limits=limits), cost, budget), []
        while True:
            spent = [cost[chosen][limit.member[chosen]].sum() for limit in limits]
            pairs = list(zip(limits, spent, strict=True))
            rest = budget - cost[chosen].sum() - sum(max(each.least - s, 0) for each, s in pairs)
            needy = np.any([each.member & (s < each.least) for each, s in pairs], axis=0)
            wanted = np.all([~each.member | (cost <= each.most - s) for each, s in pairs], axis=0)
            wanted &= needy | (cost <= rest)
            wanted[chosen] = False
            fits = cost <= budget - cost[chosen].sum()
            np.testing.assert_array_equal(ledger.open & fits, wanted & fits)
            rows = np.flatnonzero(wanted & fits)
            if not len(rows):
                break
            before = ledger.open.sum()
            row = int(generator.choice(rows))
            chosen.append(row)
            assert ledger.take(row) >= (ledger.open.sum() < before - 1)
