"""Instances that greedy cannot tell apart, put together: of equal ones only the first can be the next choice.

A choice makes the bounds of all others stale: among k equal instances each would cost k gains.
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags.constraints import Limit
from megatron_ksa.data_tools.tags.objective import entries_of

ROWS_AT_ONCE = 1 << 20
# Odd numbers with mixed bits (the golden ratio's, and those of splitmix64).
_INDEX, _VALUE, _MIX = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _hashes(mass: csr_array, limits: tuple[Limit, ...]) -> np.ndarray:
    """uint64 [rows], equal where rows and memberships are."""
    result = np.empty(mass.shape[0], np.uint64)
    for first in range(0, len(result), ROWS_AT_ONCE):
        bounds = mass.indptr[first : first + ROWS_AT_ONCE + 1]
        part = slice(bounds[0], bounds[-1])
        mixed = mass.indices[part].astype(np.uint64) * _INDEX + mass.data[part].view(np.uint64) * _VALUE
        mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed ^ (mixed >> np.uint64(29)))])
        result[first : first + len(bounds) - 1] = np.diff(sums[bounds - bounds[0]])
    for limit in limits:
        result = (result + limit.member.astype(np.uint64)) * _INDEX
    return result


def _same(mass: csr_array, limits: tuple[Limit, ...], one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [pairs], whether two rows and their memberships are equal; int64 [pairs] each."""
    result = np.diff(mass.indptr)[one] == np.diff(mass.indptr)[other]
    for limit in limits:
        result &= limit.member[one] == limit.member[other]
    for first in range(0, len(one), ROWS_AT_ONCE):
        pairs = first + np.flatnonzero(result[first : first + ROWS_AT_ONCE])
        (a, lengths), (b, _) = entries_of(mass, one[pairs]), entries_of(mass, other[pairs])
        differs = (mass.indices[a] != mass.indices[b]) | (mass.data[a] != mass.data[b])
        result[pairs] = np.bincount(np.repeat(np.arange(len(pairs)), lengths), differs, minlength=len(pairs)) == 0
    return result


class Alike:
    """Groups of equal instances, of which the cheapest and then the lowest comes first, the head.

    Args:
        mass: float64 [instances, nodes], indices sorted.
        cost: float64 [instances].
        limits: equal instances are members of the same ones.

    Attributes:
        head: int64 [groups], the next instance of each group; rising at first.
    """

    def __init__(self, mass: csr_array, cost: np.ndarray, limits: tuple[Limit, ...] = ()) -> None:
        hashes = _hashes(mass, limits)
        order = np.argsort(cost, kind="stable")
        order = order[np.argsort(hashes[order], kind="stable")]
        follows = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        del hashes
        follows = follows[_same(mass, limits, order[follows], order[follows + 1])] + 1
        starts = np.delete(np.arange(len(order)), follows)
        by_head = np.argsort(order[starts])
        self._members, self._ends = order, np.append(starts[1:], len(order))[by_head]
        self._place = starts[by_head]
        self.head = order[self._place]

    def advance(self, groups: np.ndarray, usable: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Make each group's head one that may be chosen; what is passed over never may be.

        Args:
            groups: int64 [groups].
            usable: which of some instances, int64 [rows], may be chosen: bool [rows].

        Returns:
            bool [groups], whether the group has such an instance.
        """
        found = usable(self.head[groups])
        for number in np.flatnonzero(~found & (self._place[groups] + 1 < self._ends[groups])):
            group = groups[number]
            rest = self._members[self._place[group] : self._ends[group]]
            step = 1
            while not found[number] and len(rest):
                hits = np.flatnonzero(usable(rest[:step]))
                found[number] = len(hits) > 0
                rest = rest[hits[0] if len(hits) else step :]
                step *= 2
            self._place[group] = self._ends[group] - max(len(rest), 1)
            self.head[group] = self._members[self._place[group]]
        return found
