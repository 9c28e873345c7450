"""The branch of an instance, for everything that needs one: datasets of the write step, the report, cluster-balanced
sampling and the comparison with known topics.

An instance has several tags, and they may lie in several branches. Its branch is, among those that hold any of its
tags, the one whose mean is nearest to the mean of its tags. Counting tags decides less: a fifth to a third of the
instances of a real pool have as many tags in two branches (`examples/tags/README.md` has the comparison).
"""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array, diags_array

from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.objective import ancestors
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.errors import UsageError

ROWS_AT_ONCE = 8192


def branch_means(pool: Pool, nodes: np.ndarray) -> np.ndarray:
    """Unit vectors, float32 [nodes, dimensions]: mean of the tags at or below each, a tag once an instance.

    Args:
        nodes: int64 [nodes].
    """
    leaves = pool.leaf_nodes
    count = np.bincount(pool.leaves, minlength=len(pool.parent)) if pool.count is None else pool.count
    below = csr_array(ancestors(pool.parent)[leaves][:, nodes].T)
    return unit(below @ (diags_array(count[leaves].astype(np.float64)) @ pool.leaf_vectors))


def instance_vectors(pool: Pool, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Unit vectors of instances, the means of their tags, a block of rows at a time: [block, dimensions].

    Args:
        pool: with `leaf_vectors`.
        rows: int64 [rows].
    """
    leaves = pool.leaf_nodes
    for first in range(0, len(rows), ROWS_AT_ONCE):
        block = slice(first, min(first + ROWS_AT_ONCE, len(rows)))
        yield block, unit(pool.shares[rows[block]][:, leaves] @ pool.leaf_vectors)


def branch_of(pool: Pool, nodes: np.ndarray) -> np.ndarray:
    """The branch of each instance among `nodes`: int64 [instances], -1 for an instance without a tag below them.

    Args:
        pool: with `leaf_vectors`; instances of another pool on the same tree have the same branches.
        nodes: int64 [nodes], none above another; the first counts among equals.

    Raises:
        UsageError: the pool has no vectors of its leaves.
    """
    if pool.leaf_vectors is None:
        raise UsageError("the tree has no embeddings of its tags (embeddings.npy); run the tree step")
    means, found = branch_means(pool, nodes), np.full(pool.instances, -1, np.int64)
    held = csr_array(pool.shares @ ancestors(pool.parent)[:, nodes])
    held.sort_indices()
    for block, vectors in instance_vectors(pool, np.arange(pool.instances)):
        bounds = held.indptr[block.start : block.stop + 1]
        row = np.repeat(np.arange(len(vectors)), np.diff(bounds))
        column = held.indices[bounds[0] : bounds[-1]]
        near = np.einsum("kd,kd->k", vectors[row], means[column])
        # Rows in order, the nearest first, then the first node.
        order = np.lexsort((column, -near, row))
        rows, best = np.unique(row[order], return_index=True)
        found[block.start + rows] = nodes[column[order][best]]
    return found
