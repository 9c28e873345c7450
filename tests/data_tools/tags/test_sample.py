"""The sampling step: budgets, weights, methods, and input that cannot work."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array

from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.tags.budget import parse_budget
from megatron_ksa.data_tools.tags.objective import (
    default_shape,
    default_share_exponent,
    node_weights,
    noise_of_tags,
    strengths,
    tag_shares,
)  # fmt: skip
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.sample import METHODS, SampleSettings, sample
from megatron_ksa.errors import UsageError

TOKENS = np.full(200, 10)


def with_vectors(pool):
    """The pool with an embedding for each leaf, near to those of its topic."""
    generator = np.random.default_rng(0)
    topics = generator.normal(size=(len(pool.parent), 8))
    vectors = topics[pool.parent[pool.leaf_nodes]] + 0.1 * generator.normal(size=(len(pool.leaf_nodes), 8))
    return replace(pool, leaf_vectors=vectors)


@pytest.mark.parametrize(
    ("text", "amount", "in_tokens"),
    [
        ("50", 50, False), ("5%", 10, False), ("0.05", 10, False), ("1.0", 200, False), ("1", 1, False),
        ("0.1%", 1, False),
        ("500t", 500, True), ("1.5kt", 1500, True), ("0.001Mt", 1000, True), ("2e3t", 2000, True),
    ],
)  # fmt: skip
def test_budget_forms(text, amount, in_tokens):
    budget = parse_budget(text, 200, TOKENS)
    assert (budget.amount, budget.in_tokens) == (amount, in_tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "an integer"), ("-5", "an integer"), ("", "an integer"), ("nan", "an integer"), ("0", "at least one"),
        ("0%", "at least one"), ("201", "has 200 instances"), ("120%", "at most 1"), ("1.5", "at most 1"),
        ("3kt", "has 2,000 tokens"), ("9t", "shortest instance has 10"), ("0t", "at least one"),
    ],
)  # fmt: skip
def test_budget_that_cannot_be_met(text, message):
    with pytest.raises(UsageError, match=message):
        parse_budget(text, 200, TOKENS)


def test_token_budget_needs_token_counts():
    with pytest.raises(UsageError, match="--tokenizer-model"):
        parse_budget("5kt", 200, None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["100", "9kt"])
def test_every_method_spends_its_budget_once_the_same_for_the_same_seed(method, budget):
    pool = with_vectors(topic_pool(instances=1000)[0])
    found = sample(pool, SampleSettings(budget, method=method))
    assert len(set(found.chosen.tolist())) == len(found.chosen)
    if found.budget.in_tokens:
        assert 9000 - pool.tokens.max() < pool.tokens[found.chosen].sum() <= 9000
    else:
        assert len(found.chosen) == 100
    assert found.summary["tokens"] == pool.tokens[found.chosen].sum()
    np.testing.assert_array_equal(sample(pool, SampleSettings(budget, method=method)).chosen, found.chosen)
    other = sample(pool, SampleSettings(budget, method=method, seed=1))
    assert (set(other.chosen) != set(found.chosen)) == (method in ("random", "cluster-balanced"))


def test_methods_do_what_their_names_say():
    pool = with_vectors(topic_pool(instances=1000)[0])
    found = {method: sample(pool, SampleSettings("80", method=method)) for method in METHODS}
    topic = pool.parent[pool.leaves[::5]]
    assert np.bincount(topic[found["cluster-balanced"].chosen])[1:].tolist() == [10] * 8
    assert pool.quality[found["top-quality"].chosen].min() >= np.sort(pool.quality)[-80]
    information = {method: sample_.summary["information"] for method, sample_ in found.items()}
    assert information["tags"] == max(information.values())
    assert information["random"] < 0.9 * information["tags"]


def test_label_graph_is_mig_as_its_code_has_it():
    """Against dense matrices: rows were normalised where MIG divides by the receiving label's sum, and gains were exact
    where MIG takes them to first order, which covers labels far sooner."""
    pool = with_vectors(topic_pool(instances=60, topics=3, leaves=5)[0])
    found = sample(pool, SampleSettings("10", method="label-graph", label_similarity=0.8))
    unit = pool.leaf_vectors / np.linalg.norm(pool.leaf_vectors, axis=1, keepdims=True)
    graph = np.where(unit @ unit.T >= 0.8, unit @ unit.T, 0)
    graph /= graph.sum(axis=0)
    assert np.count_nonzero(graph) > len(graph) and not np.allclose(graph, graph.T)
    labels = np.zeros((60, len(graph)))
    labels[np.arange(60).repeat(5), pool.leaves - pool.leaf_nodes[0]] = 1
    spread = strengths(pool.quality, pool.difficulty)[:, None] * labels @ graph
    chosen, total = [], np.zeros(len(graph))
    for _ in range(10):
        values = spread @ (0.8 * (total + 1e-6) ** -0.2)
        values[chosen] = -1
        chosen.append(int(np.argmax(values)))
        total += spread[chosen[-1]]
    np.testing.assert_array_equal(found.chosen, chosen)


def test_quality_difficulty_and_depth_weights():
    np.testing.assert_allclose(strengths(np.array([1.0, 4.0, np.nan]), np.array([2.0, 2.0, 2.0])), [0.4, 1.6, 1.0])
    roots = strengths(np.array([1.0, 4.0]), np.array([3.0, 9.0]), quality_weight=0.5, difficulty_weight=0)
    np.testing.assert_allclose(roots, [2 / 3, 4 / 3])
    np.testing.assert_array_equal(strengths(np.full(3, np.nan), np.full(3, np.nan)), np.ones(3))
    pool, _ = topic_pool(instances=1000)
    settings = SampleSettings("50")
    mean = {w: pool.quality[sample(pool, replace(settings, quality_weight=w)).chosen].mean() for w in (0.0, 1.0, 3.0)}
    assert mean[0.0] < mean[1.0] < mean[3.0]
    leaves = {
        w: len(set(pool.leaves.reshape(-1, 5)[sample(pool, replace(settings, depth_weight=w)).chosen].ravel()))
        for w in (0.01, 100.0)
    }
    assert leaves[0.01] < leaves[100.0]


@pytest.mark.parametrize(("phi", "power"), [("power", 0.4), ("power", 0.5), ("log1p", 0.4)])
@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_a_levels_optimum_is_the_pools_share_to_the_exponent(phi, power, exponent):
    """At that optimum every node of the level gains as much from one more unit of mass."""
    held = np.array([1.0, 0.5, 0.3, 0.2])
    tree = np.array([-1, 0, 0, 0]), np.array([0, 1, 1, 1])
    weight = node_weights(held, *tree, phi=phi, power=power, share_exponent=exponent, depth_weight=3.0)
    assert weight[0] == 1
    mass = 1e6 * held[1:] ** exponent
    slope = weight[1:] * (power * mass ** (power - 1) if phi == "power" else 1 / (1 + mass))
    np.testing.assert_allclose(slope, slope[0], rtol=1e-5)


def test_a_branch_of_many_tags_is_sought_more_than_one_of_few():
    """With one exponent, 0.4, for tags and branches a branch of 8 tags had as much as one of 2 of them is worth: its
    tags had 0.65 times the mass of the others, though every tag was as frequent."""
    tags, branch = 10, np.array([0] * 8 + [1] * 2)
    leaves = np.arange(2000) % tags
    parent = np.concatenate([[-1, 0, 0], 1 + branch]).astype(np.int32)
    pool = Pool(np.arange(2001), (3 + leaves).astype(np.int32), np.full(2000, 5.0), np.full(2000, 5.0), parent,
                np.array([0, 1, 1] + [2] * tags))  # fmt: skip
    worst = {}
    for exponent in (0.4, 1.0):
        settings = SampleSettings("400", power=0.4, branch_exponent=exponent, branch_weight=1.0)
        chosen = sample(pool, settings).chosen
        count = np.bincount(leaves[chosen], minlength=tags)
        worst[exponent] = count.min() / count.max()
    assert worst[0.4] < 0.9 and worst[1.0] == 1


def test_tags_are_sought_alike_where_each_is_the_only_one_of_its_instances():
    """With 0.4 for tags of every pool, labels that are the only tags were covered less evenly than by MIG: 44.6
    effective labels of 51 against 47.7 (sections, `tags_objective`). Of many tags the rare ones are sought less."""
    assert default_share_exponent(tag_shares(np.arange(6), np.arange(5), 5)) == 0
    assert default_share_exponent(tag_shares(np.array([0]), np.array([], int), 5)) == 0
    counts = np.array([400, 200, 100, 50, 50])
    leaves = np.repeat(np.arange(5), counts)
    pool = Pool(np.arange(801), (1 + leaves).astype(np.int32), np.full(800, 5.0), np.full(800, 5.0),
                np.array([-1, 0, 0, 0, 0, 0], np.int32), np.array([0, 1, 1, 1, 1, 1]))  # fmt: skip
    found = sample(pool, SampleSettings("100"))
    assert np.bincount(leaves[found.chosen]).tolist() == [20] * 5 and found.summary["share_exponent"] == 0
    given = sample(pool, SampleSettings("100", share_exponent=1))  # an integer, which was a traceback
    assert np.bincount(leaves[given.chosen]).tolist() == [50, 25, 13, 6, 6]


@pytest.mark.parametrize("given", [False, True])
def test_where_tags_are_names_branches_count_for_nothing_and_the_score_by_the_instance(given):
    """The power 0.4 and branches of several tags took more of a tag whose other instances score low: labels that are
    the only tags were covered less evenly than by MIG at the same mean score, by 0.3 of 47.8 effective labels
    (sections, `tags_margin`)."""
    # Two tags under one branch, one under another; every score alike: branches at 1 seek the third more.
    leaves = np.repeat([0, 1, 2], 200)
    pool = Pool(np.arange(601), (3 + leaves).astype(np.int32), np.full(600, 5.0), np.full(600, 5.0),
                np.array([-1, 0, 0, 1, 1, 2], np.int32), np.array([0, 1, 1, 2, 2, 2]))  # fmt: skip
    former = {"power": 0.4, "branch_weight": 1.0}
    found = sample(pool, SampleSettings("90", **(former if given else {})))
    shape = found.summary["power"], found.summary["branch_weight"]
    assert shape == ((0.4, 1.0) if given else pytest.approx((0.7, 0.0)))
    count = np.bincount(leaves[found.chosen]).tolist()
    assert count[2] > 30 if given else count == [30] * 3
    # With a target the shape is the one that alignment was chosen for.
    target = np.array([0, 0, 0, 1.0, 1.0, 1.0])
    aligned = sample(pool, SampleSettings("90"), target).summary
    assert (aligned["power"], aligned["branch_weight"]) == (0.4, 1.0)


def test_the_power_and_the_branches_follow_the_noise():
    # Tag 0 is in 400 instances; in 100 of them one of the tags 1 to 4 is beside it: noise 1.
    beside = [[0, 1 + k % 4] if k < 100 else [0] for k in range(400)]
    assert default_shape(_tags_of(beside)) == (0.4, 1.0)
    pairs = [[2 * pair, 2 * pair + 1] if k < 30 else [2 * pair] for pair in range(8) for k in range(90)]
    noise = noise_of_tags(_tags_of(pairs))
    assert 0.1 < noise < 0.9 and default_shape(_tags_of(pairs)) == pytest.approx((0.7 - 0.3 * noise, noise))
    assert default_shape(_tags_of([[k % 5] for k in range(500)])) == pytest.approx((0.7, 0.0))
    assert default_shape(tag_shares(np.array([0]), np.array([], int), 5)) == (0.7, 0.0)


def _tags_of(names: list[list[int]]) -> csr_array:
    """float64 [instances, 400], the shares of each instance's tags."""
    return tag_shares(np.cumsum([0, *map(len, names)]), np.concatenate(names), 400)


def test_tags_are_sought_alike_where_several_are_names_of_one_thing():
    """The exponent asked only how many tags an instance has: with 200 labels and three to five true tags it was 0.52,
    and 166 effective labels were covered, by MIG 182 (several-many, `tags_margin`)."""
    # Label k of 6 is in 40 * (k + 1) instances, each with three tags that are its own.
    names = [[3 * label, 3 * label + 1, 3 * label + 2] for label in range(6) for _ in range(40 * (label + 1))]
    assert default_share_exponent(_tags_of(names)) == pytest.approx(0, abs=1e-6)
    # The same beside 100 details that one label has, each in two or three instances: the number of tags alone decides.
    details = [[*tags, 100 + k % 100] if tags[0] == 15 else tags for k, tags in enumerate(names)]
    counts = np.array([len(tags) for tags in details])
    assert noise_of_tags(_tags_of(details)) == 1
    assert default_share_exponent(_tags_of(details)) == pytest.approx(0.7 * (1 - (1 / counts).mean()))


def test_noise_is_how_much_rarer_a_tag_is_than_those_beside_it_or_how_many_are_hardly_seen():
    # Tag 0 is in 400 instances; in 100 of them one of the tags 1 to 4 is beside it, 25 instances each.
    beside = [[0, 1 + k % 4] if k < 100 else [0] for k in range(400)]
    held = np.log([350, 12.5])
    rarer = ((100 * (held.mean() - held[0]) + 300 * 0) / 400 + 4 * (held.mean() - held[1])) / 5
    assert noise_of_tags(_tags_of(beside)) == pytest.approx(min(1, (rarer / 0.4) ** 2)) == 1
    # Tags in pairs, one of which is in 1.5 times as many instances.
    pairs = [[2 * pair, 2 * pair + 1] if k < 60 else [2 * pair] for pair in range(8) for k in range(90)]
    above, below = np.log([60, 30])
    rarer = (60 * (below - above) / 2 / 90 + (above - below) / 2) / 2
    assert noise_of_tags(_tags_of(pairs)) == pytest.approx((rarer / 0.4) ** 2, rel=1e-6) and rarer > 0.05
    # Half of the tags are in two instances, of which half of a pool has both with a chance of 1/4; half are in forty.
    free = [[tag, 100 + tag] for tag in range(50) for _ in range(2)]
    free += [[200 + tag, 300 + tag] for tag in range(50) for _ in range(40)]
    assert noise_of_tags(_tags_of(free)) == 1
    few = free[: 2 * 10] + free[100:]
    assert noise_of_tags(_tags_of(few)) == pytest.approx((0.75 * 20 / 120 / 0.25) ** 2, rel=1e-6)


def test_noise_does_not_depend_on_copies_of_a_pool_of_frequent_tags():
    generator = np.random.default_rng(0)
    names = [sorted(set(generator.integers(5, 20, 3))) + [20 + k % 6] for k in range(2000)]
    names += [[tag] for tag in range(20, 26) for _ in range(500)]
    once, often = noise_of_tags(_tags_of(names)), noise_of_tags(_tags_of(7 * names))
    assert often == pytest.approx(once) and 0.1 < once < 0.9


def test_the_default_chooses_alike_at_any_size_of_the_pool():
    """With log(1 + x) a pool of copies ten times as large gave another mix of topics for ten times the budget."""
    pool, _ = topic_pool(instances=400, tilt=1.5)
    pool = replace(pool, quality=np.full(400, 5.0), difficulty=np.full(400, 5.0))
    # Of 40 instances each is a 40th: what rounding moves then is more than what is asked here.
    pool, larger = pool.take(np.arange(400).repeat(4)), pool.take(np.arange(400).repeat(40))
    mixes = []
    for changes in ({}, {"share_exponent": 0.4}, {"share_exponent": 0.4, "phi": "log1p"}):
        small, large = (
            np.bincount(pool.parent[each.leaves[each.indptr[chosen]]], minlength=9) / len(chosen)
            for each, budget in ((pool, "160"), (larger, "1600"))
            for chosen in [sample(each, SampleSettings(budget, **changes)).chosen]
        )
        mixes.append(np.abs(small - large).sum())
    assert max(mixes[:2]) < 0.1 < mixes[2]


def test_parts_come_close_to_one_greedy():
    pool, target = topic_pool(instances=2000)
    whole, parted = (sample(pool, SampleSettings("60", parts=parts), target).summary for parts in (1, 4))
    assert parted["information"] > 0.95 * whole["information"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "--method best: not one of tags, random"), ({"phi": "exp"}, "--phi exp"),
        ({"align_weight": -1.0}, "--align-weight -1.0"), ({"align_weight": float("nan")}, "--align-weight nan"),
        ({"depth_weight": 0.0}, "--depth-weight"), ({"power": 0.0}, "--power 0.0"), ({"power": 1.5}, "--power"),
        ({"share_exponent": -1.0}, "--share-exponent"), ({"branch_exponent": -1.0}, "--branch-exponent"),
        ({"branch_weight": -1.0}, "--branch-weight -1.0"),
        ({"quality_weight": float("inf")}, "--quality-weight"),
        ({"parts": 0}, "--parts"), ({"seed": -1}, "--seed -1"),
        ({"label_similarity": float("nan")}, "--label-similarity"),
        # Below 0 it joined labels with negative weights, whose powers are no numbers.
        ({"label_similarity": -0.5}, "--label-similarity -0.5: from 0"),
        # Every gain was 0.
        ({"power": 1e-300}, "--power 1e-300: from 0.01"),
    ],
)  # fmt: skip
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        SampleSettings("10", **changes)


def test_bad_pools_and_targets():
    pool, target = topic_pool(instances=20)
    for changes, message in (
        ({"quality_weight": 1000.0}, "--quality-weight 1000"), ({"difficulty_weight": 1e6}, "--difficulty-weight 1e"),
        ({"depth_weight": 1e200}, "--depth-weight 1e"), ({"depth_weight": 1e-200}, "--depth-weight 1e-200"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            sample(pool, SampleSettings("5", **changes))
    with pytest.raises(UsageError, match="none of its tags is on the tree"):
        sample(pool, SampleSettings("5"), 0 * target)
    with pytest.raises(UsageError, match="no instances"):
        sample(replace(pool, indptr=np.array([0])), SampleSettings("5"))
    with pytest.raises(UsageError, match="no embeddings"):
        sample(pool, SampleSettings("5", method="label-graph"))
    with pytest.raises(UsageError, match="instance 3 of the pool has no tokens"):
        sample(replace(pool, tokens=np.where(np.arange(20) == 3, 0, 50)), SampleSettings("100t"))


def test_pool_without_any_tag_is_spent_in_order():
    pool, target = topic_pool(instances=20)
    untagged = replace(pool, indptr=np.zeros(21, np.int64), leaves=np.array([], np.int32))
    np.testing.assert_array_equal(sample(untagged, SampleSettings("5"), target).chosen, np.arange(5))
