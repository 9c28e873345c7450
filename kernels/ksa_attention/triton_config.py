"""Tile shapes of the KSA attention kernels: one table per head dimension, dtype size and kind of GPU."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, warps of a program, and stages of its software pipeline.

    specialised: 1 for the Hopper kernel of `gluon_forward`, `gluon_dq` or `gluon_dkv`: two such tiles of queries (of
    keys in `gluon_dkv`) in a program, each with its own `warps`, fed by one more warp; at least 2 stages.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    specialised: int = 0


class Tiles(NamedTuple):
    """The tile of each kernel of `triton_text.text_attention`."""

    forward: Tile
    dq: Tile
    dkv_text: Tile
    dkv_summary: Tile

    def pack(self) -> list[int]:
        """The twenty numbers, as custom ops take them."""
        return [number for tile in self for number in tile]

    @classmethod
    def unpack(cls, numbers: list[int]) -> "Tiles":
        return cls(*(Tile(*numbers[start : start + 5]) for start in range(0, 20, 5)))


# bf16 and fp16, by padded head dimension; measured on an H100 with the sweep of kernels/benchmarks (see its README).
HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# Several query heads share a K/V head: larger tiles of its summaries read the queries less often.
HALF_GROUPED = HALF | {128: HALF[128]._replace(dkv_summary=Tile(64, 128, 8, 3))}
# Compute capability 9: warp-specialised kernels where they are faster.
HOPPER = HALF | {128: Tiles(Tile(64, 128, 4, 2, 1), Tile(64, 64, 4, 3, 1), HALF[128].dkv_text, Tile(64, 64, 4, 3, 1))}
HOPPER_GROUPED = HOPPER | {128: HOPPER[128]._replace(dkv_text=Tile(64, 64, 4, 3, 1))}
# float32 products run on the plain arithmetic units: small tiles.
SINGLE = {
    64: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    128: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    256: Tiles(*[Tile(16, 16, 4, 1)] * 4),
}


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile in the kernels: the next power of two, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def _stored(head_dim: int, dtype: torch.dtype, grouped: bool, hopper: bool) -> Tiles:
    dim = max(64, padded_head_dim(head_dim))
    if dtype == torch.float32:
        return SINGLE[dim]
    if hopper:
        return (HOPPER_GROUPED if grouped else HOPPER)[dim]
    return (HALF_GROUPED if grouped else HALF)[dim]


def tiles_for(q: Tensor, groups: int) -> Tiles:
    """The stored tiles for queries [B, n, Hq, D <= 256] and `groups` K/V heads on the queries' device."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return _stored(q.shape[-1], q.dtype, q.shape[2] > groups, hopper)
