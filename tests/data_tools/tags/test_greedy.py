"""Greedy against the objective in loops, against plain greedy, and against exhaustive search."""

import itertools

import numpy as np
import pytest
from tag_pools import random_pool

from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.partition import random_parts, two_round_greedy


@pytest.mark.parametrize("phi", ["power", "log1p"])
def test_greedy_is_brute_force_greedy_on_random_pools(phi):
    for seed in range(100):
        pool = random_pool(seed, phi=phi)
        coverage = pool.coverage()
        found = greedy(coverage, 5)
        chosen: list[int] = []
        for step in range(5):
            before = pool.value(chosen)
            gains = np.array([-1.0 if i in chosen else pool.value([*chosen, i]) - before for i in range(12)])
            best = int(np.flatnonzero(gains > gains.max() - 1e-12)[0])
            assert found.chosen[step] == best
            assert found.gains[step] == pytest.approx(gains[best], abs=1e-12)
            chosen.append(best)
        assert coverage.value(found.chosen) == pytest.approx(pool.value(chosen), abs=1e-12)


@pytest.mark.parametrize("window", [1, 4, 8192])
def test_lazy_and_plain_greedy_choose_the_same(window):
    for seed in range(30):
        pool = random_pool(seed, instances=60, nodes=40)
        if seed % 2:
            pool.strength[:] = 1.0  # instances with the same tags tie
        coverage = pool.coverage()
        for cost in (None, np.random.default_rng(seed).integers(1, 9, 60)):
            lazy, plain = greedy(coverage, 20, cost, window=window), greedy(coverage, 20, cost, lazy=False)
            np.testing.assert_array_equal(lazy.chosen, plain.chosen)
            np.testing.assert_array_equal(lazy.gains, plain.gains)


def test_lazy_greedy_computes_few_gains():
    coverage = random_pool(0, instances=3000, nodes=400).coverage()
    lazy, plain = greedy(coverage, 100), greedy(coverage, 100, lazy=False)
    np.testing.assert_array_equal(lazy.chosen, plain.chosen)
    assert lazy.evaluations < plain.evaluations / 10


def test_copies_of_one_instance_fill_the_budget_from_the_first_on():
    pool = random_pool(0, instances=1)
    pool.indptr, pool.leaves = np.arange(0, 601, 2), np.tile(pool.leaves[:1], 600)
    pool.strength = np.ones(300)
    np.testing.assert_array_equal(greedy(pool.coverage(), 250, window=16).chosen, np.arange(250))


def test_budget_larger_than_the_pool_takes_everything_and_an_empty_pool_nothing():
    pool = random_pool(0)
    assert sorted(greedy(pool.coverage(), 99).chosen) == list(range(12))
    empty = pool.coverage().take(np.array([], np.int64))
    assert not len(greedy(empty, 5).chosen) and not len(greedy(empty, 5, np.array([])).chosen)


def test_value_is_at_least_the_bound_of_the_exhaustive_optimum():
    for seed in range(30):
        pool = random_pool(seed)
        coverage = pool.coverage()
        best = max(coverage.value(np.array(s)) for s in itertools.combinations(range(12), 4))
        assert coverage.value(greedy(coverage, 4).chosen) >= (1 - 1 / np.e) * best
        parted = two_round_greedy(lambda rows, f=coverage: (f.take(rows), None), random_parts(12, 3, seed), 4)
        assert len(set(parted.chosen)) == 4
        assert coverage.value(parted.chosen) == pytest.approx(parted.gains.sum())
        assert coverage.value(parted.chosen) >= (1 - 1 / np.e) / 2 * best


def test_value_with_costs_is_at_least_the_bound_of_the_exhaustive_optimum():
    for seed in range(30):
        pool = random_pool(seed, instances=10)
        coverage, cost = pool.coverage(), np.random.default_rng(seed).integers(1, 9, 10)
        fitting = (s for k in range(11) for s in itertools.combinations(range(10), k) if cost[list(s)].sum() <= 12)
        best = max(coverage.value(np.array(s, np.int64)) for s in fitting)
        found = greedy(coverage, 12, cost)
        assert cost[found.chosen].sum() <= 12
        assert coverage.value(found.chosen) >= (1 - 1 / np.e) / 2 * best


def test_one_large_instance_beats_many_small_ones():
    """Gain a token alone would spend the budget on the small ones."""
    pool = random_pool(1)
    large = int(np.flatnonzero(np.diff(pool.indptr))[-1])
    pool.strength[:], pool.strength[large] = 1e-3, 0.2
    cost = np.ones(12)
    cost[large] = 100.0
    coverage = pool.coverage()
    np.testing.assert_array_equal(greedy(coverage, 100, cost).chosen, [large])


def test_parts_see_only_themselves_and_the_union():
    pool = random_pool(5, instances=200, nodes=60)
    coverage, seen = pool.coverage(), []

    def load(rows):
        seen.append(rows)
        return coverage.take(rows), None

    parts = random_parts(200, 4, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(200))
    two_round_greedy(load, parts, 10)
    assert [len(rows) for rows in seen] == [*map(len, parts), 40]
