"""Numbers behind the report: per node of the tree, the pool against the selection and the target."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags.branches import instance_vectors
from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.objective import ancestors
from megatron_ksa.data_tools.tags.pool import Pool

# Instances nearest to the mean of a branch that are shown, of those chosen and of those left out.
TYPICAL = 6
# Rows of a branch whose vectors are held together.
HELD_ROWS = 1 << 16


@dataclass(frozen=True)
class NodeStatistics:
    """One value a node, over what lies at or below it.

    Args:
        pool, selected: int64 [nodes], instances with a tag there.
        pool_share, selected_share, target_share: float64 [nodes], share of all tag mass; the target's is None without a
            target.
        coverage: float64 [nodes], share of the pool's tag mass whose tag some chosen instance carries; NaN where the
            pool has none.
        pool_quality, selected_quality: float64 [nodes], mean score, NaN where there is none.
        other_share: float64 [nodes], share of another run's selection, or None.
    """

    pool: np.ndarray
    selected: np.ndarray
    pool_share: np.ndarray
    selected_share: np.ndarray
    target_share: np.ndarray | None
    coverage: np.ndarray
    pool_quality: np.ndarray
    selected_quality: np.ndarray
    other_share: np.ndarray | None = None


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)


def _counts_and_quality(shares: csr_array, above: csr_array, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [nodes], instances at or below; float64 [nodes], their mean score."""
    present = csr_array(shares @ above)
    present.data = np.ones_like(present.data)
    scored = ~np.isnan(quality)
    total = present.T @ np.where(scored, quality, 0.0)
    return present.sum(axis=0).round().astype(np.int64), _ratio(total, present.T @ scored.astype(np.float64))


def _subtree_shares(shares: csr_array, above: csr_array) -> np.ndarray:
    mass = shares.sum(axis=0)
    return (mass @ above) / (mass.sum() or 1.0)


def node_statistics(
    pool: Pool, chosen: np.ndarray, target: csr_array | None = None, other: np.ndarray | None = None
) -> NodeStatistics:
    """Statistics of every node.

    Args:
        chosen: int64 [chosen], rows of the pool.
        target: float64 [target instances, nodes], its tag shares.
        other: int64 [rows], what another run chose.
    """
    above = ancestors(pool.parent)
    selection = pool.shares[chosen]
    counts, quality = _counts_and_quality(pool.shares, above, pool.quality)
    selected, selected_quality = _counts_and_quality(selection, above, pool.quality[chosen])
    mass = pool.shares.sum(axis=0)
    covered = np.where(selection.sum(axis=0) > 0, mass, 0.0) @ above
    return NodeStatistics(
        counts, selected, _subtree_shares(pool.shares, above), _subtree_shares(selection, above),
        None if target is None else _subtree_shares(target, above),
        _ratio(covered, mass @ above), quality, selected_quality,
        None if other is None else _subtree_shares(pool.shares[other], above),
    )  # fmt: skip


def largest_nodes(count: np.ndarray, depth: np.ndarray, limit: int) -> np.ndarray:
    """bool [nodes], the `limit` nodes with most instances; with a node all above it, since they have no fewer."""
    kept = np.zeros(len(count), bool)
    kept[np.lexsort((depth, -count))[:limit]] = True
    return kept


def preorder(parent: np.ndarray, kept: np.ndarray, size: np.ndarray) -> np.ndarray:
    """int64 [kept nodes], every node before those below it, and siblings by falling size.

    Args:
        parent: int [nodes], -1 at the root.
        kept: bool [nodes]; a kept node's parent is kept.
    """
    children: dict[int, list[int]] = {}
    # Rising size, so that popping a stack gives the largest first.
    for node in np.lexsort((-np.arange(len(parent)), size)):
        if kept[node]:
            children.setdefault(int(parent[node]), []).append(int(node))
    order, stack = [], children.get(-1, [])
    while stack:
        node = stack.pop()
        order.append(node)
        stack += children.get(node, [])
    return np.array(order, np.int64)


def typical_rows(pool: Pool, branch: np.ndarray, is_chosen: np.ndarray) -> np.ndarray:
    """int64 [rows], of each branch the chosen and the left-out instances nearest to the mean of its instances.

    Args:
        pool: with `leaf_vectors`.
        branch: int64 [instances], the branch of each, -1 for none.
        is_chosen: bool [instances].
    """
    found: list[np.ndarray] = []
    for node in np.unique(branch[branch >= 0]):
        rows = np.flatnonzero(branch == node)
        # A large branch may hold most of the pool: its vectors are made twice, never all at once.
        held = list(instance_vectors(pool, rows)) if len(rows) <= HELD_ROWS else None
        blocks = held or instance_vectors(pool, rows)
        total = np.sum([vectors.sum(0, dtype=np.float64) for _, vectors in blocks], axis=0)
        middle = unit((total / len(rows))[None])[0]
        near = np.concatenate([vectors @ middle for _, vectors in held or instance_vectors(pool, rows)])
        order = rows[np.argsort(-near, kind="stable")]
        found += [order[is_chosen[order]][:TYPICAL], order[~is_chosen[order]][:TYPICAL]]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def choose_samples(
    pool: Pool, chosen: np.ndarray, limit: int, first: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Instances to show: `first`, then for each tag in turn, the rarest first, one chosen and one left out.

    Args:
        limit: instances at most.
        first: int64 [rows], those that are shown whatever their tags.

    Returns:
        int64 [samples], rows of the pool, rising, and bool [samples], whether each is chosen.
    """
    is_chosen = np.zeros(pool.instances, bool)
    is_chosen[chosen] = True
    by_leaf = csr_array(pool.shares.T)
    leaves = np.flatnonzero(np.diff(by_leaf.indptr))
    picked: dict[int, None] = dict.fromkeys([] if first is None else first.tolist())
    for leaf in leaves[np.argsort(np.diff(by_leaf.indptr)[leaves], kind="stable")]:
        rows = by_leaf.indices[by_leaf.indptr[leaf] : by_leaf.indptr[leaf + 1]]
        for group in (rows[is_chosen[rows]], rows[~is_chosen[rows]]):
            if len(group) and not any(int(row) in picked for row in group[:50]):
                picked[int(group[0])] = None
        if len(picked) >= limit:
            break
    rows = np.array(sorted(list(picked)[:limit]), np.int64)
    return rows, is_chosen[rows]
