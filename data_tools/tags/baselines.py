"""Methods to compare with: random, top quality, cluster-balanced, and MIG's label graph (arXiv 2504.13835)."""

import numpy as np
from scipy.sparse import csr_array, diags_array

from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.constraints import Ledger, Rules
from megatron_ksa.data_tools.tags.objective import FirstOrderCoverage
from megatron_ksa.data_tools.tags.pool import Pool

LABEL_SIMILARITY = 0.9
LABEL_POWER = 0.8
LABELS_AT_ONCE = 1024


def spend(order: np.ndarray, budget: float, cost: np.ndarray | None, rules: Rules | None = None) -> np.ndarray:
    """Walk an order and take every instance that still fits the budget: int64 [chosen].

    Args:
        order: int64 [instances].
        budget: instances, or tokens where `cost` (int [instances]) is given.
        rules: what the selection must hold.

    Raises:
        UsageError: rules that cannot be met.
    """
    if rules:
        return _spend_by_rules(order, budget, np.ones(len(order)) if cost is None else cost, rules)
    if cost is None:
        return order[: int(budget)]
    spent, taken = np.cumsum(cost[order]), []
    first = int(np.searchsorted(spent, budget, side="right"))
    left = budget - (spent[first - 1] if first else 0)
    for row in order[first:]:
        if cost[row] <= left:
            taken.append(row)
            left -= cost[row]
    return np.concatenate([order[:first], np.array(taken, np.int64)])


def _spend_by_rules(order: np.ndarray, budget: float, cost: np.ndarray, rules: Rules) -> np.ndarray:
    rules.check(budget, cost)
    ledger, left = Ledger(rules, cost, budget), budget
    taken: list[int] = []
    for row in np.concatenate([rules.first, order[~np.isin(order, rules.first)]]):
        if cost[row] <= left and (ledger.open[row] or len(taken) < len(rules.first)):
            taken.append(int(row))
            left -= cost[row]
            ledger.take(row)
    return np.array(taken, np.int64)


def random_order(instances: int, seed: int) -> np.ndarray:
    """int64 [instances], any order with the same chance."""
    return np.random.default_rng(seed).permutation(instances)


def top_quality(quality: np.ndarray) -> np.ndarray:
    """int64 [instances], the best first; ties go to the lower index, instances without a score (NaN) come last."""
    return np.argsort(-np.where(np.isnan(quality), -np.inf, quality), kind="stable")


def cluster_balanced(cluster: np.ndarray, seed: int) -> np.ndarray:
    """int64 [instances]: one random instance of each cluster, then a second one of each, and so on."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(cluster))
    by_cluster = shuffled[np.argsort(cluster[shuffled], kind="stable")]
    sizes = np.unique(cluster, return_counts=True)[1]
    place = np.empty(len(cluster), np.int64)
    place[by_cluster] = np.arange(len(cluster)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.lexsort((generator.random(len(cluster)), place))


def tree_clusters(pool: Pool, budget: float) -> np.ndarray:
    """Cluster of every instance: its branch on the level with the number of nodes nearest to sqrt(budget)."""
    levels = np.bincount(pool.depth)
    level = int(np.abs(levels[1:] - np.sqrt(budget)).argmin()) + 1 if len(levels) > 1 else 0
    return branch_of(pool, np.flatnonzero(pool.depth == level))


def label_graph(vectors: np.ndarray, similarity: float = LABEL_SIMILARITY) -> csr_array:
    """What a label passes on to each label: float64 [labels, labels], columns sum to 1.

    That is the normalisation of MIG's own code (`mig/sampler.py`, `calc_prop_matrix`): each weight is divided by the
    sum of the label that receives. Labels are joined where their cosine is at least `similarity`, with the cosine as
    the edge's weight and 1 for a label itself.

    Args:
        vectors: float [labels, dimensions].
    """
    unit = vectors.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    rows, columns, cosines = [], [], []
    for first in range(0, len(unit), LABELS_AT_ONCE):
        near = unit[first : first + LABELS_AT_ONCE] @ unit.T
        near[np.arange(len(near)), first + np.arange(len(near))] = 1.0
        row, column = np.nonzero(near >= similarity)
        rows.append(row + first)
        columns.append(column)
        cosines.append(near[row, column].astype(np.float64))
    graph = csr_array(
        (np.concatenate(cosines), (np.concatenate(rows), np.concatenate(columns))), shape=(len(unit),) * 2
    )
    return csr_array(graph @ diags_array(1 / graph.sum(axis=0)))


def label_information(
    shares: csr_array, strength: np.ndarray, leaves: np.ndarray, graph: csr_array
) -> FirstOrderCoverage:
    """MIG's information over labels: sum_k phi((A^T sum_{i in S} s_i t_i)_k).

    t_i is 0 or 1 for each label, as instance i has it, and phi(x) = (x + 1e-6)^0.8.

    MIG's own code chooses by phi'(masses of S) times the masses of an instance, to first order, and so does this.

    Args:
        shares: float64 [instances, nodes].
        strength: float64 [instances], s_i.
        leaves: int64 [labels], the leaf node of each label.
        graph: float64 [labels, labels], A, as `label_graph` gives it.
    """
    labels = csr_array(shares[:, leaves])
    labels.data = np.repeat(strength, np.diff(labels.indptr))
    mass = csr_array(labels @ graph)
    mass.sort_indices()
    return FirstOrderCoverage(mass, np.ones(len(leaves)), np.zeros(len(leaves)), LABEL_POWER)
