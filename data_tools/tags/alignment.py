"""Alignment to a target (docs/tags.md, 6), written so that greedy keeps its guarantee.

With q the target's leaf distribution and p_S the selection's, smoothed over L leaves,

    p_S(v) = (1 - eta) m_v(S) / M + eta / L,    KL(q || p_S) = sum_v q_v log(q_v / p_S(v)),

where m_v(S) sums a leaf's shares over S and M = sum_v m_v(S). M is known before anything is chosen: it is the budget,
in instances, or in tokens where shares are weighted with tokens. With M fixed, -KL is a sum of concave functions of
sums, equal to the stated one once the budget is spent. I(S)/I_norm - lambda KL(q || p_S) is then monotone and
submodular like I itself, so lazy greedy applies with its bound, and neither random batches nor re-evaluation of the
whole pool is needed.
"""

import numpy as np
from scipy.sparse import csr_array, hstack

from megatron_ksa.data_tools.tags.objective import Coverage

SMOOTHING = 0.01
ALIGN_WEIGHT = 0.7


def leaf_distribution(shares: csr_array, rows: np.ndarray | None = None) -> np.ndarray:
    """float64 [nodes], shares summed over the rows (all by default) and divided by their sum; zeros if that is 0."""
    total = (shares if rows is None else shares[np.asarray(rows, np.int64)]).sum(axis=0)
    return total / (total.sum() or 1.0)


def divergence(target: np.ndarray, selection: np.ndarray, leaves: int) -> float:
    """KL(q || p_S), nats.

    Args:
        target, selection: float64 [nodes], leaf distributions; the selection's is smoothed here.
        leaves: leaves of the tree, L.
    """
    held = target > 0
    smoothed = (1 - SMOOTHING) * selection[held] + SMOOTHING / leaves
    return float(target[held] @ np.log(target[held] / smoothed))


def align(
    information: Coverage,
    shares: csr_array,
    target: np.ndarray,
    leaves: int,
    *,
    budget: float,
    norm: float,
    align_weight: float = ALIGN_WEIGHT,
) -> Coverage:
    """f(S) = I(S)/norm + align_weight * (KL(q || p of the empty set) - KL(q || p_S)), with p_S taken at the budget.

    Args:
        information: I.
        shares: float64 [instances, nodes], leaf shares, times tokens where the budget is in tokens.
        target: float64 [nodes], q, which sums to 1.
        leaves: leaves of the tree, L.
        budget: what the shares of the selection will sum to, M.
        norm: I_norm, above 0.
    """
    held = np.flatnonzero(target > 0)
    mass = hstack([information.mass, shares[:, held]], format="csr")
    mass.sort_indices()
    slope = (1 - SMOOTHING) / budget * leaves / SMOOTHING
    return Coverage(
        csr_array(mass),
        np.concatenate([information.weight / norm, align_weight * target[held]]),
        np.concatenate([information.scale, np.full(len(held), slope)]),
        information.power,
    )
