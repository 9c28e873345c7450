"""Tile shapes of the KSA attention kernels: one table per head dimension and dtype size."""

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, warps of a program, and stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tile of each kernel of `triton_text.text_attention`."""

    forward: Tile
    dq: Tile
    dkv_text: Tile
    dkv_summary: Tile

    def pack(self) -> list[int]:
        """The sixteen numbers, as custom ops take them."""
        return [number for tile in astuple(self) for number in tile]

    @classmethod
    def unpack(cls, numbers: list[int]) -> "Tiles":
        return cls(*(Tile(*numbers[start : start + 4]) for start in range(0, 16, 4)))


# bf16 and fp16, by padded head dimension; measured on an H100 by kernels/benchmarks/ksa_attention.py --sweep.
HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# float32 products run on the plain arithmetic units: small tiles.
SINGLE = {
    64: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    128: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    256: Tiles(*[Tile(16, 16, 4, 1)] * 4),
}


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile in the kernels: the next power of two, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The stored tiles for a head dimension of at most 256."""
    table = SINGLE if dtype == torch.float32 else HALF
    return table[max(64, padded_head_dim(head_dim))]
