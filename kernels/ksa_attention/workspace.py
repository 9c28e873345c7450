"""Memory that the kernels of one backward pass of the text queries share."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles, padded_head_dim

# dK/dV programs wanted at least: about four for each multiprocessor of a large GPU. Without them a part of the queries
# makes a program of its own, whose float32 results cost less than an idle multiprocessor unless every query head has
# its own keys and work items are dealt out.
PROGRAMS, DEALT_PROGRAMS = 512, 256
MOST_SPLITS = 16


class Workspace(NamedTuple):
    """Uninitialised but for the counters and document_stop.

    Attributes:
        lse2, delta: float32 [B, Hq, nq], each head's row at a multiple of 16 bytes: lse * log2(e), and
            rowsum(dO * O) - dLSE. The dQ kernel writes both, the dK/dV kernels read them.
        dealt_dq, dealt_text, dealt_summary: int32 [1 + turns], 0: work items that a specialised kernel has dealt, and
            for each consumer's tile of keys the parts of the queries that it has added up.
        text_sums, summary_sums: float32, for dK and for dV, where several programs share a tile of keys: for
            specialised tiles [B, Hkv, keys, padded D], else [splits, B, keys, Hkv, D].
        document_stop: int32 [B, rows], the first position after each position's document, for specialised kernels.
    """

    lse2: Tensor
    delta: Tensor
    dealt_dq: Tensor
    dealt_text: Tensor
    dealt_summary: Tensor
    text_sums: tuple[Tensor | None, Tensor | None]
    summary_sums: tuple[Tensor | None, Tensor | None]
    document_stop: Tensor | None

    def pack(self) -> tuple[Tensor | None, ...]:
        """The tensors alone, ten or None."""
        return *self[:5], *self.text_sums, *self.summary_sums, self.document_stop

    @classmethod
    def unpack(cls, tensors: tuple[Tensor | None, ...]) -> "Workspace":
        return cls(*tensors[:5], tensors[5:7], tensors[7:9], tensors[9])


def new_dealt(device: torch.device, *turns: int) -> tuple[Tensor, ...]:
    """Counters of work items, each followed by so many turns: int32 [1 + turns], 0."""
    sizes = [1 + count for count in turns]
    return torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)


def splits(q: Tensor, k: Tensor, tile: Tile) -> int:
    """Parts of the queries that make work items of their own in the dK/dV kernel."""
    batch, num_keys, groups, _ = k.shape
    if not num_keys or not q.shape[1]:
        return 1
    programs = triton.cdiv(num_keys, tile.keys * (1 + tile.specialised)) * batch * groups
    wanted = DEALT_PROGRAMS if tile.specialised and q.shape[2] == groups else PROGRAMS
    return min(MOST_SPLITS, triton.cdiv(wanted, programs), triton.cdiv(q.shape[1], tile.queries))


def _sums_and_turns(q: Tensor, k: Tensor, tile: Tile) -> tuple[tuple[Tensor | None, Tensor | None], int]:
    parts = splits(q, k, tile)
    if parts == 1:
        return (None, None), 0
    batch, num_keys, groups, dim = k.shape
    shape, turns = (parts, *k.shape), 0
    if tile.specialised:
        shape = (batch, groups, num_keys, padded_head_dim(dim))
        turns = 2 * triton.cdiv(num_keys, 2 * tile.keys) * batch * groups
    return tuple(torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(2)), turns


def new_workspace(
    q: Tensor, k: Tensor, k_summary: Tensor, document_start: Tensor | None, lse: Tensor, tiles: Tiles
) -> Workspace:
    """A workspace for queries [B, nq, Hq, D], text keys and summaries [B, keys, Hkv, D] and lse [B, Hq, nq]."""
    batch, heads, nq = lse.shape
    padded = triton.cdiv(nq, 4) * 4
    lse2, delta = torch.empty((2, batch, heads, padded), dtype=lse.dtype, device=lse.device)[..., :nq]
    text_sums, text_turns = _sums_and_turns(q, k, tiles.dkv_text)
    summary_sums, summary_turns = _sums_and_turns(q, k_summary, tiles.dkv_summary)
    document_stop = None
    if document_start is not None and (tiles.dkv_text.specialised or tiles.dkv_summary.specialised):
        document_stop = document_stops(document_start)
    dealt = new_dealt(lse.device, 0, text_turns, summary_turns)
    return Workspace(lse2, delta, *dealt, text_sums, summary_sums, document_stop)


def document_stops(document_start: Tensor) -> Tensor:
    """The first position after each position's document: int32 [B, rows], from the first positions, int32 [B, rows]."""
    positions = torch.arange(document_start.shape[1], dtype=torch.int32, device=document_start.device)
    rows = document_start.contiguous()
    return torch.searchsorted(rows, positions.expand_as(rows).contiguous(), right=True, out_int32=True)
