"""Tile shapes of the KSA attention kernels: defaults by head dimension, dtype size and kind of GPU, and measured ones.

Measured tiles are in tiles.json (see tile_store.py).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.tile_store import PACKAGE_STORE, Situation, StoredTile, choose, read


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, warps of a program, and stages of its software pipeline.

    specialised: 1 for the Hopper kernel of `gluon_forward`, `gluon_dq` or `gluon_dkv`: a program has two tiles of
    `queries` (of `keys` in `gluon_dkv`) with `warps` warps each, fed by one more warp; at least 2 stages.
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

    def serve_summaries(self, chunk_size: int, summary_tokens: int) -> bool:
        """Whether these kernels serve the summary queries beside the text queries of the same chunks.

        All four kernels must be specialised. A tile of keys must be as long as one consumer's queries or both
        consumers', so that the last tile holds the text beside them. C must be a power of two up to 8 and S at most 8:
        one thread holds 8 channels of all keys of a chunk in registers.
        """
        beside = all(tile.keys in (tile.queries, 2 * tile.queries) for tile in (self.forward, self.dq))
        short = chunk_size.bit_count() == 1 and chunk_size <= 8 and summary_tokens <= 8
        return beside and short and all(tile.specialised for tile in self)

    def pack(self) -> list[int]:
        """The twenty numbers, as custom ops take them."""
        return [*self.forward, *self.dq, *self.dkv_text, *self.dkv_summary]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> "Tiles":
        return cls(*(Tile(*numbers[start : start + 5]) for start in range(0, 20, 5)))


# bf16 and fp16, by padded head dimension; chosen on an H100 from sweeps whose records were not kept.
HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# Several query heads share a K/V head: larger tiles of its summaries read the queries less often.
HALF_GROUPED = HALF | {128: HALF[128]._replace(dkv_summary=Tile(64, 128, 8, 3))}
# Compute capability 9: warp-specialised kernels where they are faster.
HOPPER = {128: Tiles(Tile(64, 128, 4, 2, 1), Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 3, 1))}
# float32 products run on the plain arithmetic units: small tiles.
SINGLE = {
    64: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    128: Tiles(*[Tile(32, 32, 4, 2)] * 4),
    256: Tiles(*[Tile(16, 16, 4, 1)] * 4),
}


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile in the kernels: the next power of two, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def default_tiles(head_dim: int, dtype: torch.dtype, grouped: bool, hopper: bool) -> Tiles:
    """The tiles where no measured ones are stored."""
    dim = max(64, padded_head_dim(head_dim))
    if dtype == torch.float32:
        return SINGLE[dim]
    if hopper and dim in HOPPER:
        return HOPPER[dim]
    return (HALF_GROUPED if grouped else HALF)[dim]


@functools.cache
def _package_store() -> list[StoredTile]:
    return read(PACKAGE_STORE)


def situation(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool, C: int, W: int) -> Situation:
    """The key under which the tiles of these kernels are stored."""
    gpu = capability = "cpu"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Situation(gpu, capability, dtype.itemsize, padded_head_dim(head_dim), grouped, C, W)


@functools.cache
def _look_up(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool, C: int, W: int) -> tuple[int, ...]:
    wanted = situation(device, dtype, head_dim, grouped, C, W)
    tiles = default_tiles(head_dim, dtype, grouped, wanted.capability.startswith("9."))
    stored = {kernel: choose(_package_store(), kernel, wanted) for kernel in Tiles._fields}
    tiles = tiles._replace(**{kernel: Tile(*record.tile) for kernel, record in stored.items() if record is not None})
    return tuple(tiles.pack())


# torch.compile looks through a cache and would trace the reading of the file.
@torch.compiler.assume_constant_result
def _constants(*settings) -> tuple[int, ...]:
    return _look_up(*settings)


def tile_numbers(q: Tensor, groups: int, geometry: KSAGeometry) -> tuple[int, ...]:
    """The tiles for queries [B, n, Hq, D <= 256] and `groups` K/V heads on the queries' device, as `Tiles.pack`.

    Those stored in tiles.json for the GPU or its compute capability (rule: `tile_store.choose`), else the defaults.
    Looked up once and then cached.
    """
    _, _, heads, dim = q.shape
    return _constants(q.device, q.dtype, dim, heads > groups, geometry.chunk_size, geometry.window_chunks)


def tiles_for(q: Tensor, groups: int, geometry: KSAGeometry) -> Tiles:
    """The tiles of `tile_numbers` by name."""
    return Tiles.unpack(tile_numbers(q, groups, geometry))
