"""The benchmark of the tree's margin to MIG: its bound on evenness, and its variants of the objective."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megatron_ksa.data_tools.benchmarks import tags_margin
from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.benchmarks.tags_objective import judge
from megatron_ksa.data_tools.tags.objective import default_share_exponent, node_weights, tag_shares, tree_information
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample


@pytest.mark.parametrize("seed", range(4))
def test_no_selection_of_at_least_the_score_is_more_even_than_the_bound(seed):
    generator = np.random.default_rng(seed)
    labels, quality = np.sort(generator.integers(0, 4, 12)), generator.integers(1, 11, 12).astype(float)
    pool = replace(topic_pool(instances=12)[0], quality=quality)
    found = [judge(pool, labels, np.array(chosen)) for chosen in combinations(range(12), 5)]
    means = {each["quality"] for each in found}
    best = {mean: max(each["effective"] for each in found if each["quality"] >= mean) for mean in means}
    bounds = {mean: tags_margin.most_even(labels, quality, 5, mean) for mean in means}
    assert all(bounds[mean] >= best[mean] - 1e-9 for mean in means)
    # Where the score asks nothing, the bound is what the most even selection has, but for the least price.
    assert bounds[min(means)] == pytest.approx(max(best.values()), rel=0.02)
    assert len({round(bound, 3) for bound in bounds.values()}) > 3


def test_variants_are_the_default_objective_and_gains_times_the_score():
    pool, _ = topic_pool(instances=300)
    default = tags_margin.VARIANTS[tags_margin.DEFAULT].choose(pool, 1.3)
    settings = SampleSettings(str(len(default)), quality_weight=1.3, difficulty_weight=1.0)
    np.testing.assert_array_equal(default, sample(pool, settings).chosen)
    score = pool.quality**1.3 * pool.difficulty
    former = sample(pool, replace(settings, power=0.4, branch_weight=1.0)).chosen
    np.testing.assert_array_equal(tags_margin.VARIANTS[tags_margin.FORMER].choose(pool, 1.3), former)
    assert set(former) != set(default)
    weight = node_weights(pool.held, pool.parent, pool.depth, share_exponent=default_share_exponent(pool.shares))
    coverage = tree_information(pool.shares, np.ones(300), pool.parent, weight)
    chosen, total = [], np.zeros(len(weight))
    for _ in range(len(default)):
        gains = score * coverage.gains(np.arange(300), total, coverage.phi(total))
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        total = coverage.masses(np.array(chosen))
    np.testing.assert_array_equal(tags_margin.VARIANTS["gains times the score"].choose(pool, 1.3), chosen)


def test_power_and_branches_follow_the_number_of_tags():
    shapes = [tags_margin.VARIANTS[f"power and branches by {name}"].shape for name in ("number of tags", "only tags")]
    for counts, number, only in (([1, 1], (0.8, 0.03), (0.8, 0.03)), ([3, 3], (0.4, 1.0), (0.4, 1.0)),
                                 ([1, 3], (0.8 / 1.5, 0.155), (0.5, 0.7575))):  # fmt: skip
        for shape, expected in zip(shapes, (number, only), strict=True):
            shares = tag_shares(np.cumsum([0, *counts]), np.arange(sum(counts)), sum(counts))
            assert shape(shares) == pytest.approx(expected)


def test_the_table_tells_differences_from_noise(monkeypatch):
    monkeypatch.setattr(tags_margin, "DRAWS", 3)
    column = {"pool": "sections", "tags": "true"}
    mig = {"labels": [5, 5, 5], "effective": [3.0, 4.0, 5.0], "most": [4.0, 5.0, 6.0]}
    tree = {"labels": [5, 6, 5], "effective": [2.8, 3.8, 4.8]}
    runs = [column | {"choice": tags_margin.MIG} | mig, column | {"choice": tags_margin.DEFAULT} | tree]
    text = tags_margin.section(runs, ["sections"])
    assert "| true | sections | 4.00 ± 1.00 | 5.00 | 3.80 ± 1.00 | +0.33 ± 0.58 | **-0.20 ± 0.00** |" in text
    assert "+0.33, **-0.20**" in text and "offline tags" in text
