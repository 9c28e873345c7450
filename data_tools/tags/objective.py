"""Tree information as a sum of concave functions of masses (docs/tags.md, 4 and 5).

I(S) = sum_v w(depth v) * phi(sum_{i in S} a[i, v]) with a[i, v] = s_i/|T_i| * #{t in T_i : v on the path root..t}.
Every term is concave and rising in a sum of nonnegative masses, so I is monotone and submodular.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

EPSILON = 1e-6
POWER = 0.8
PHI = ("power", "log1p")
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Coverage:
    """f(S) = sum_v weight[v] * phi_v(sum_{i in S} mass[i, v]).

    Args:
        mass: float64 [instances, nodes], at least 0, indices sorted.
        weight: float64 [nodes], at least 0.
        scale: float64 [nodes]; 0 where phi_v(x) = (x + 1e-6)^0.8 - (1e-6)^0.8, and c where phi_v(x) = log(1 + c x).
    """

    mass: csr_array
    weight: np.ndarray
    scale: np.ndarray

    @property
    def instances(self) -> int:
        """Rows of the mass."""
        return self.mass.shape[0]

    def phi(self, x: np.ndarray, nodes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float64 [k], phi of the nodes (int [k], all by default) at the masses x, float64 [k]."""
        scale = self.scale[nodes]
        logarithmic = scale > 0
        if logarithmic.all():
            return np.log1p(scale * x)
        if not logarithmic.any():
            return (x + EPSILON) ** POWER - EPSILON**POWER
        result = np.empty(len(x))
        result[logarithmic] = np.log1p(scale[logarithmic] * x[logarithmic])
        result[~logarithmic] = (x[~logarithmic] + EPSILON) ** POWER - EPSILON**POWER
        return result

    def masses(self, chosen: np.ndarray) -> np.ndarray:
        """float64 [nodes], sum of mass over the chosen instances, int64 [chosen]."""
        return self.mass[np.asarray(chosen, np.int64)].sum(axis=0)

    def value(self, chosen: np.ndarray) -> float:
        """f of the chosen instances, int64 [chosen]."""
        return float(self.weight @ self.phi(self.masses(chosen)))

    def gains(self, rows: np.ndarray, total: np.ndarray, reached: np.ndarray) -> np.ndarray:
        """float64 [rows], f(S + i) - f(S) for the instances `rows`, int64 [rows].

        A row's gain does not depend on the rows beside it, to the bit.

        Args:
            total: float64 [nodes], masses of S.
            reached: float64 [nodes], phi of them.
        """
        result = np.empty(len(rows))
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            starts = self.mass.indptr[part]
            lengths = self.mass.indptr[part + 1] - starts
            before = np.cumsum(lengths) - lengths
            entries = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
            nodes = self.mass.indices[entries]
            gain = self.weight[nodes] * (self.phi(total[nodes] + self.mass.data[entries], nodes) - reached[nodes])
            owner = np.repeat(np.arange(len(part)), lengths)
            result[first : first + len(part)] = np.bincount(owner, gain, minlength=len(part))
        return result

    def singles(self) -> np.ndarray:
        """float64 [instances], f({i})."""
        zero = np.zeros(len(self.weight))
        return self.gains(np.arange(self.instances), zero, zero)

    def take(self, members: np.ndarray) -> "Coverage":
        """The same function over the instances `members` only, int64 [members]."""
        return Coverage(self.mass[members], self.weight, self.scale)


def tag_shares(indptr: np.ndarray, leaves: np.ndarray, nodes: int) -> csr_array:
    """float64 [instances, nodes]: 1/|T_i| for each of an instance's tags, added up where it has a leaf twice.

    Args:
        indptr: int64 [instances + 1], bounds of each instance's tags in `leaves`, int32 [tags], leaf nodes of the tree.
        nodes: nodes of the tree.
    """
    counts = np.diff(indptr)
    entries = (np.repeat(1.0 / np.maximum(counts, 1), counts), leaves, indptr)
    shares = csr_array(entries, shape=(len(counts), nodes), copy=True)  # what follows works in place
    shares.sum_duplicates()
    return shares


def ancestors(parent: np.ndarray) -> csr_array:
    """float64 [nodes, nodes]: 1 where the column is on the path from the root to the row, both ends included.

    Args:
        parent: int [nodes], -1 at the root.
    """
    rows, columns = [np.arange(len(parent))], [np.arange(len(parent))]
    while len(rows[-1]):
        above = parent[columns[-1]]
        rows.append(rows[-1][above >= 0])
        columns.append(above[above >= 0])
    places = np.concatenate(rows), np.concatenate(columns)
    return csr_array((np.ones(len(places[0])), places), shape=(len(parent), len(parent)))


def ground(shares: csr_array, strength: np.ndarray, parent: np.ndarray) -> csr_array:
    """a[i, v], float64 [instances, nodes].

    Args:
        shares: float64 [instances, nodes], as `tag_shares` gives them.
        strength: float64 [instances], s_i.
        parent: int [nodes], -1 at the root.
    """
    mass = csr_array(
        (shares.data * np.repeat(strength, np.diff(shares.indptr)), shares.indices, shares.indptr), shares.shape
    )
    mass = mass @ ancestors(parent)
    mass.sort_indices()
    return mass


def tree_information(
    shares: csr_array,
    strength: np.ndarray,
    parent: np.ndarray,
    weight: np.ndarray,
    *,
    phi: str = "power",
) -> Coverage:
    """I(S).

    Args:
        shares, strength, parent: as `ground` takes them.
        weight: float64 [nodes], w of each node's depth, as `level_weights` gives it.
        phi: one of `PHI`.
    """
    return Coverage(ground(shares, strength, parent), weight, np.full(len(parent), float(PHI.index(phi))))


def level_weights(
    held: np.ndarray, depth: np.ndarray, amount: float, *, phi: str = "power", depth_weight: float = 1.0
) -> np.ndarray:
    """w(depth) of each node, float64 [nodes]; 1 at the root.

    phi is concave, so mass counts the more the more nodes it is spread over: with equal weights the leaves, which are
    many, would decide alone, and branches would fill up in proportion to the pool. So a level is divided by what a
    selection like the pool would have there, for each unit of its mass:

        w(d) = depth_weight^d * sum_v held_v / sum_v phi(amount * held_v) * phi(amount),    v at depth d.

    Args:
        held: float64 [nodes], share of the pool's tags at or below each node; 1 at the root.
        depth: int [nodes], 0 at the root.
        amount: mass that a selection will have, its instances.
        phi: one of `PHI`.
    """
    plain = Coverage(csr_array((0, len(held))), np.ones(len(held)), np.full(len(held), float(PHI.index(phi))))
    reached = np.bincount(depth, plain.phi(amount * held))
    mean = np.divide(np.bincount(depth, held), reached, out=np.zeros(len(reached)), where=reached > 0)
    return (mean * reached[0] * float(depth_weight) ** np.arange(len(mean)))[depth]


def strengths(
    quality: np.ndarray, difficulty: np.ndarray, *, quality_weight: float = 1.0, difficulty_weight: float = 1.0
) -> np.ndarray:
    """s_i = quality^quality_weight * difficulty^difficulty_weight, divided by its mean: float64 [instances].

    Args:
        quality, difficulty: float [instances], above 0; NaN, a missing score, counts as the median of those there are.
    """
    result = np.ones(len(quality))
    for score, exponent in ((quality, quality_weight), (difficulty, difficulty_weight)):
        score = np.asarray(score, np.float64)
        known = score[~np.isnan(score)]
        result *= np.where(np.isnan(score), np.median(known) if len(known) else 1.0, score) ** exponent
    return result / result.mean() if len(result) else result
