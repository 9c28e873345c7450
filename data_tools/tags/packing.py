"""Whole documents packed into sequences of one length, so that none is cut where a training sample ends.

Megatron cuts its samples from documents laid end to end in any order; where each has the length of a sample, samples
are documents.
"""

import numpy as np

# Sequences that wait for a document that fits: more leave less room empty, and take more memory.
OPEN_SEQUENCES = 64


class Packer:
    """Packs documents as they come: each goes where it leaves the least room, or starts a sequence.

    Args:
        length: tokens of a sequence.
        end_of_document: fills what is left, outside the loss.
    """

    def __init__(self, length: int, end_of_document: int) -> None:
        self.length, self.end_of_document = length, end_of_document
        self._open: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._left: list[int] = []
        self.filled = 0

    def add(self, ids: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Take a document, int32 [tokens] and uint8 [tokens], at most `length`; returns the sequences that are done."""
        fits = [(left - len(ids), place) for place, left in enumerate(self._left) if left >= len(ids)]
        if fits:
            left, place = min(fits)
        else:
            self._open.append([])
            self._left.append(self.length)
            left, place = self.length - len(ids), len(self._open) - 1
        self._open[place].append((ids, mask))
        self._left[place] = left
        done = [self._close(place)] if left == 0 else []
        if len(self._open) > OPEN_SEQUENCES:
            done.append(self._close(int(np.argmin(self._left))))
        return done

    def rest(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The sequences that still waited."""
        return [self._close(0) for _ in range(len(self._open))]

    def _close(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        documents, left = self._open.pop(place), self._left.pop(place)
        self.filled += left
        ids = [ids for ids, _ in documents] + [np.full(left, self.end_of_document, np.int32)]
        return np.concatenate(ids), np.concatenate([mask for _, mask in documents] + [np.zeros(left, np.uint8)])
