"""Megatron's zig-zag split of a sequence over context-parallel ranks.

A sequence is cut into 2 * size segments of equal length; rank r holds segments r and 2 * size - 1 - r, in this order,
so that causal attention costs every rank the same. Text rows and summary rows are split alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ZigZag:
    """The split of one sequence over `size` ranks, seen from `rank`."""

    rank: int = 0
    size: int = 1

    def segments(self, rank: int | None = None) -> tuple[int, int]:
        """Both segments of a rank (by default this one), in the order in which it holds them."""
        rank = self.rank if rank is None else rank
        return rank, 2 * self.size - 1 - rank

    def take(self, rows: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of a whole sequence along `dim`, whose length is a multiple of 2 * size."""
        if self.size == 1:
            return rows
        by_segment = rows.unflatten(dim, (2 * self.size, -1))
        return torch.cat([by_segment.select(dim, segment) for segment in self.segments()], dim=dim)

    def by_segment(self, rows: Tensor, dim: int = 0) -> list[Tensor]:
        """Rows of all ranks, concatenated in the order of ranks along `dim`: views of the segments of the sequence."""
        first, second = rows.unflatten(dim, (self.size, 2, -1)).unbind(dim + 1)
        return [*first.unbind(dim), *reversed(second.unbind(dim))]

    def restore(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Rows of all ranks, concatenated in the order of ranks along `dim`, in the order of the sequence."""
        return rows if self.size == 1 else torch.cat(self.by_segment(rows, dim), dim=dim)

    def join(self, segments: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The segments of a sequence, concatenated in the order of ranks along `dim`."""
        ranks = (self.segments(rank) for rank in range(self.size))
        return torch.cat([segments[segment] for pair in ranks for segment in pair], dim=dim)

    def by_rank(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `restore`."""
        return rows if self.size == 1 else self.join(rows.unflatten(dim, (2 * self.size, -1)).unbind(dim), dim)
