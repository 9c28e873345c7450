"""Tree information as a sum of concave functions of masses (docs/tags.md, 4 and 5).

I(S) = sum_v w_v * phi(sum_{i in S} a[i, v]) with a[i, v] = s_i/|T_i| * #{t in T_i : v on the path root..t}.
Every term is concave and rising in a sum of nonnegative masses, so I is monotone and submodular.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

EPSILON = 1e-6
POWER, SHARE_EXPONENT, BRANCH_EXPONENT = 0.4, 0.7, 0.6
# The power where tags are names: see `default_shape`.
POWER_OF_NAMES = 0.7
# Where tags are taken for noise as much as they can be: see `noise_of_tags`.
RARER, OPEN = 0.4, 0.25
PHI = ("power", "log1p")
ROWS_AT_ONCE = 1 << 16


def entries_of(matrix: csr_array, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of `rows`, int64 [rows], lie in the matrix's arrays, and how many each has.

    Returns:
        int64 [entries], row after row; int64 [rows].
    """
    starts = matrix.indptr[rows]
    lengths = matrix.indptr[rows + 1] - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum()), lengths


@dataclass(frozen=True)
class Coverage:
    """f(S) = sum_v weight[v] * phi_v(sum_{i in S} mass[i, v]).

    Args:
        mass: float64 [instances, nodes], at least 0, indices sorted.
        weight: float64 [nodes], at least 0.
        scale: float64 [nodes]; 0 where phi_v(x) = (x + 1e-6)^power - (1e-6)^power, and c where phi_v(x) = log(1 + c x).
        power: above 0, at most 1.
    """

    mass: csr_array
    weight: np.ndarray
    scale: np.ndarray
    power: float = POWER

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
            return (x + EPSILON) ** self.power - EPSILON**self.power
        result = np.empty(len(x))
        result[logarithmic] = np.log1p(scale[logarithmic] * x[logarithmic])
        result[~logarithmic] = (x[~logarithmic] + EPSILON) ** self.power - EPSILON**self.power
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
            entries, lengths = entries_of(self.mass, part)
            nodes = self.mass.indices[entries]
            gain = self.weight[nodes] * self._rise(nodes, self.mass.data[entries], total, reached)
            owner = np.repeat(np.arange(len(part)), lengths)
            result[first : first + len(part)] = np.bincount(owner, gain, minlength=len(part))
        return result

    def _rise(self, nodes: np.ndarray, mass: np.ndarray, total: np.ndarray, reached: np.ndarray) -> np.ndarray:
        """float64 [k], what each node's phi gains by a mass on top of its total."""
        return self.phi(total[nodes] + mass, nodes) - reached[nodes]

    def singles(self) -> np.ndarray:
        """float64 [instances], f({i})."""
        zero = np.zeros(len(self.weight))
        return self.gains(np.arange(self.instances), zero, zero)

    def take(self, members: np.ndarray) -> "Coverage":
        """The same function over the instances `members` only, int64 [members]."""
        return replace(self, mass=self.mass[members])


@dataclass(frozen=True)
class FirstOrderCoverage(Coverage):
    """A `Coverage` whose gains are taken to first order: phi'(masses of S) times the mass of the instance.

    Such a gain never rises as S grows, so lazy greedy chooses as plain greedy does. It is far from the true one where
    a node has no mass yet: phi'(0) is 12.7 for the power 0.8, a whole unit of mass gains 0.94.
    """

    def _rise(self, nodes: np.ndarray, mass: np.ndarray, total: np.ndarray, reached: np.ndarray) -> np.ndarray:
        scale, x = self.scale[nodes], total[nodes]
        slope = np.where(scale > 0, scale / (1 + scale * x), self.power * (x + EPSILON) ** (self.power - 1))
        return slope * mass


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
    power: float = POWER,
) -> Coverage:
    """I(S).

    Args:
        shares, strength, parent: as `ground` takes them.
        weight: float64 [nodes], as `node_weights` gives it.
        phi: one of `PHI`.
        power: exponent of the power.
    """
    return Coverage(ground(shares, strength, parent), weight, np.full(len(parent), float(PHI.index(phi))), power)


def default_share_exponent(shares: csr_array) -> float:
    """The exponent of tags where none is given: 0.7 * (1 - mean of 1/|T_i|) * `noise_of_tags`.

    An instance's only tag is what it is about, and so are several that are all as frequent: then every tag is sought
    alike. Else most of several tags are beside the point, and rare ones more often, so that rare tags are sought less.

    Args:
        shares: float64 [instances, nodes], as `tag_shares` gives them.
    """
    counts = np.diff(shares.indptr)
    if not counts.any():
        return 0.0
    several = 1 - (1 / counts[counts > 0]).mean()
    return SHARE_EXPONENT * float(several) * noise_of_tags(shares)


def default_shape(shares: csr_array) -> tuple[float, float]:
    """The power and the branches' factor where none are given: 0.7 - 0.3 * `noise_of_tags`, and the noise.

    Where tags are names, as much of each is what is sought, and branches of several tags tell nothing that tags do not.
    There the score decides what is left: where s is the score's factor in a mass, as much is taken of each tag as
    makes s * (sum of s)^(power - 1) alike for the last instances of all. A higher power lets the sum, which is that of
    the instances taken before, count less beside the score of the instance itself.

    Args:
        shares: float64 [instances, nodes], as `tag_shares` gives them.
    """
    noise = noise_of_tags(shares)
    return POWER * noise + POWER_OF_NAMES * (1 - noise), noise


def noise_of_tags(shares: csr_array) -> float:
    """From 0, where tags are a few names of what instances are about, to 1, where rare ones are beside the point.

    min(1, max(rarer / 0.4, open / 0.25)^2), of two means over tags, each tag counted once:

    - rarer: log of how much rarer a tag is than the tags of an instance that has it (geometric mean over the
      instance's tags, the tag among these). Names of one thing are as frequent as each other; details stand beside
      frequent tags.
    - open: the part of the tags that a random half of the pool would have in fewer than two instances: (1 + n) / 2^n
      for a tag of n. It is near 0 for a list of names, and high for free words. In a small pool rare free words are
      as frequent as each other, since each is kept from two instances on; there `rarer` does not see them.

    Args:
        shares: float64 [instances, nodes], as `tag_shares` gives them; without a tag the noise is 0.
    """
    instances = np.bincount(shares.indices, minlength=shares.shape[1])
    tags = np.flatnonzero(instances)
    if not len(tags):
        return 0.0
    held = np.log(np.maximum(shares.sum(axis=0), np.finfo(float).tiny))
    entries = np.repeat(shares @ held, np.diff(shares.indptr))
    beside = np.bincount(shares.indices, entries, minlength=shares.shape[1])
    rarer = (beside[tags] / instances[tags] - held[tags]).mean()
    unseen = ((1 + instances[tags]) * 0.5 ** instances[tags].astype(float)).mean()
    return float(min(1.0, max(rarer / RARER, unseen / OPEN, 0.0) ** 2))


def node_weights(
    held: np.ndarray,
    parent: np.ndarray,
    depth: np.ndarray,
    *,
    phi: str = "power",
    power: float = POWER,
    share_exponent: float = SHARE_EXPONENT,
    branch_exponent: float = BRANCH_EXPONENT,
    branch_weight: float = 1.0,
    depth_weight: float = 1.0,
) -> np.ndarray:
    """w of each node, float64 [nodes]; the branches' factor at the root.

    Where nothing but the nodes of one level counts, and masses can be had in any amount, w_v x_v^power is maximal with
    a given sum of masses at x_v in proportion to w_v^(1/(1 - power)), and w_v log(1 + x_v) nearly at x_v in proportion
    to w_v. So with

        w_v = depth_weight^depth * held_v^(exponent * (1 - power)),    the power 0 for the logarithm,

    times `branch_weight` for inner nodes, a level's optimum has x_v in proportion to held_v^exponent: 0 seeks as much
    of every node, however rare, and 1 a selection like the pool. The exponent is one for tags, the leaves, and another
    for the branches above: a branch of many tags should not be sought as much as one of few, since its tags then would
    be sought less than others. Only ratios of masses matter to the power, so it chooses alike at any size of the pool.

    Args:
        held: float64 [nodes], share of the pool's tags at or below each node; 1 at the root.
        parent: int [nodes], -1 at the root.
        depth: int [nodes], 0 at the root.
        phi: one of `PHI`.
        power: exponent of the power.
        share_exponent, branch_exponent: of leaves, and of inner nodes.
        branch_weight: factor of inner nodes.
        depth_weight: a level's nodes count this many times those of the one above.
    """
    exponent = np.full(len(held), share_exponent, np.float64)
    above = np.unique(parent[parent >= 0])
    exponent[above] = branch_exponent
    exponent *= 1 - power if phi == "power" else 1.0
    weight = np.where(held > 0, held, 0.0) ** exponent * float(depth_weight) ** np.asarray(depth, np.float64)
    weight[above] *= branch_weight
    return weight


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
