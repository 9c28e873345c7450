"""A priority queue of millions of falling numbers, kept in arrays: what greedy asks for is the largest few thousand."""

import numpy as np

# How many times as many entries each rung but the last has as the one above, when one is cut up.
RATIO = 4


class Ladder:
    """Entries in rungs by their bounds: none of a rung is below the largest of those under it.

    Only the top rung is looked into; it is cut into rungs of growing sizes when it is larger than what is asked for. An
    entry is moved some RATIO times a rung on its way up, so each time that its bound falls costs it O(log entries).

    Args:
        bound: float64 [entries]; may fall while an entry is out of the ladder.
    """

    def __init__(self, bound: np.ndarray) -> None:
        self.bound = bound
        self._rungs: list[list[np.ndarray]] = [[np.arange(len(bound))]]
        # What no bound under a rung is above, falling; one fewer than rungs.
        self._floors: list[float] = []

    def take(self, size: int) -> tuple[np.ndarray, float]:
        """Take out the entries with the largest bounds.

        Args:
            size: how many, above 0; fewer only where there are no more.

        Returns:
            int64 [size or more], and what no bound of the others is above: -inf where there are none.
        """
        top = self._rungs.pop(0) if self._rungs else []
        count = sum(map(len, top))
        while count < size and self._rungs:
            top += self._rungs.pop(0)
            count = sum(map(len, top))
            self._floors.pop(0)
        entries = np.concatenate(top) if top else np.empty(0, np.int64)
        if len(entries) > size:
            cuts = [size]
            while cuts[-1] * RATIO < len(entries):
                cuts.append(cuts[-1] * RATIO)
            entries = entries[np.argpartition(-self.bound[entries], cuts)]
            floors = self.bound[entries[cuts]].tolist()
            entries, *rest = np.split(entries, cuts)
            self._rungs[:0] = [[part] for part in rest]
            self._floors[:0] = floors
        return entries, self._floors.pop(0) if self._floors else -np.inf

    def put(self, entries: np.ndarray) -> None:
        """Put entries, int64 [entries], back; their bounds may have fallen."""
        if not self._rungs:
            self._rungs = [[]]
        rung = np.searchsorted(-np.array(self._floors), -self.bound[entries], side="right")
        for number in np.unique(rung):
            self._rungs[number].append(entries[rung == number])
