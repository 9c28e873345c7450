"""The branch of an instance: nearest mean among the branches of its tags, whoever asks."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.tags.branches import branch_means, branch_of
from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.errors import UsageError


def hand_pool() -> Pool:
    """Root 0, branches 1 and 2, a leaf 3 of the root, leaves 4 to 6 of branch 1 and 7 and 8 of branch 2."""
    parent = np.array([-1, 0, 0, 0, 1, 1, 1, 2, 2])
    vectors = unit(np.array([[0, 0, 1.0], [1, 0, 0], [1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0.1, 1, 0]]))
    tags = [[4, 7], [6, 7], [4, 6, 8], [3], [3, 7], [], [7, 8]]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in tags])])
    depth, score = np.array([0, 1, 1, 1, 2, 2, 2, 2, 2]), np.full(len(tags), np.nan)
    return Pool(indptr, np.concatenate(tags).astype(np.int32), score, score, parent, depth, leaf_vectors=vectors)


def test_a_tie_of_votes_goes_to_the_nearer_mean():
    """[6, 7] has one tag in each branch, and both are near branch 2's mean; votes gave it to branch 1, the first."""
    pool = hand_pool()
    assert branch_of(pool, np.array([1, 2])).tolist() == [1, 2, 1, -1, 2, -1, 2]
    assert branch_of(pool, np.array([1, 2, 3])).tolist()[3] == 3


def test_definition_in_loops_and_rows_do_not_depend_on_their_neighbours(monkeypatch):
    pool, _ = topic_pool(instances=300)
    generator = np.random.default_rng(0)
    pool = replace(
        pool, leaves=generator.choice(pool.leaf_nodes, len(pool.leaves)).astype(np.int32),
        leaf_vectors=unit(generator.normal(size=(len(pool.leaf_nodes), 6))),
        count=generator.integers(1, 9, len(pool.parent)),
    )  # fmt: skip
    nodes = np.flatnonzero(pool.depth == 1)
    vector = dict(zip(pool.leaf_nodes.tolist(), pool.leaf_vectors, strict=True))
    means = {
        node: sum(pool.count[leaf] * vector[leaf] for leaf in vector if pool.parent[leaf] == node)
        for node in nodes.tolist()
    }
    means = {node: mean / np.linalg.norm(mean) for node, mean in means.items()}
    np.testing.assert_allclose(branch_means(pool, nodes), list(means.values()), atol=1e-6)
    expected = []
    for row in pool.leaves.reshape(-1, 5).tolist():
        own = sum(vector[leaf] for leaf in row)
        expected.append(max(sorted({int(pool.parent[leaf]) for leaf in row}), key=lambda node: own @ means[node]))
    found = branch_of(pool, nodes)
    assert found.tolist() == expected
    monkeypatch.setattr("megatron_ksa.data_tools.tags.branches.ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(branch_of(pool, nodes), found)
    rows = np.array([3, 50, 299])
    np.testing.assert_array_equal(branch_of(pool.take(rows), nodes), found[rows])


def test_a_pool_without_vectors_is_refused():
    with pytest.raises(UsageError, match="no embeddings"):
        branch_of(replace(hand_pool(), leaf_vectors=None), np.array([1, 2]))
