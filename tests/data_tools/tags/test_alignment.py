"""Alignment: the greedy objective is the stated one, and a larger weight means a nearer selection."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tag_pools import random_pool

from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.tags.alignment import align, divergence, leaf_distribution
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample


def tagged_pool(seed: int, instances: int):
    """A pool without untagged instances, so that shares sum to the number of instances."""
    pool = random_pool(seed, instances=4 * instances)
    tagged = np.flatnonzero(np.diff(pool.indptr))[:instances]
    leaves = [pool.leaves[pool.indptr[i] : pool.indptr[i + 1]] for i in tagged]
    pool.indptr = np.concatenate([[0], np.cumsum([len(tags) for tags in leaves])])
    pool.leaves, pool.strength = np.concatenate(leaves), pool.strength[tagged]
    return pool


def aligned_coverage(pool, budget, target, norm=3.0, weight=0.7):
    return align(pool.coverage(), pool.shares, target, pool.leaf_count, budget=budget, norm=norm, align_weight=weight)


def test_value_of_a_spent_budget_is_information_minus_divergence():
    for seed in range(20):
        pool = tagged_pool(seed, 12)
        target = leaf_distribution(pool.shares, np.arange(6, 12))
        chosen = np.random.default_rng(seed).choice(12, 4, replace=False)
        nothing = divergence(target, np.zeros(len(target)), pool.leaf_count)
        distance = divergence(target, leaf_distribution(pool.shares, chosen), pool.leaf_count)
        expected = pool.value(chosen) / 3.0 + 0.7 * (nothing - distance)
        assert aligned_coverage(pool, 4, target).value(chosen) == pytest.approx(expected, abs=1e-12)


def test_divergence_by_hand():
    target, selection = np.array([0.0, 0.5, 0.5]), np.array([0.0, 1.0, 0.0])
    expected = 0.5 * np.log(0.5 / (0.99 + 0.01 / 2)) + 0.5 * np.log(0.5 / (0.01 / 2))
    assert divergence(target, selection, 2) == pytest.approx(expected, abs=1e-14)


def test_greedy_keeps_its_bound_with_alignment():
    for seed in range(20):
        pool = tagged_pool(seed, 12)
        target = leaf_distribution(pool.shares, np.arange(9, 12))
        coverage = aligned_coverage(pool, 4, target)
        best = max(coverage.value(np.array(s)) for s in itertools.combinations(range(12), 4))
        lazy, plain = greedy(coverage, 4), greedy(coverage, 4, lazy=False)
        np.testing.assert_array_equal(lazy.chosen, plain.chosen)
        assert coverage.value(lazy.chosen) >= (1 - 1 / np.e) * best


@pytest.mark.parametrize(("tilt", "target_tilt", "budget"), [(1.0, 0.0, "5%"), (1.0, 1.0, "200"), (0.5, 1.0, "20kt")])
def test_divergence_falls_with_the_weight_and_the_default_pays(tilt, target_tilt, budget):
    pool, target = topic_pool(tilt=tilt, target_tilt=target_tilt)
    settings = SampleSettings(budget)
    divergences = [
        sample(pool, replace(settings, align_weight=weight), target).summary["divergence"]
        for weight in (0.0, 0.05, 0.2, 0.7, 2.0, 5.0)
    ]
    assert all(before > after for before, after in itertools.pairwise(divergences)), divergences
    found = sample(pool, settings, target).summary
    without = found["without_alignment"]
    assert without["divergence"] == pytest.approx(divergences[0])
    assert found["divergence"] <= without["divergence"] / 5
    assert found["information"] > 0.9 * without["information"]
