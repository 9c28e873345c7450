"""Memory that the kernels of one backward pass of the text queries share."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles

# The dK/dV kernels want at least 512 programs, about four for each multiprocessor of a large GPU. Where the keys give
# fewer, the queries are divided into parts, and each part gets a program: adding up the parts' float32 results costs
# less than idle multiprocessors. 256 programs are enough where work items are dealt out and no query heads share keys.
PROGRAMS, DEALT_PROGRAMS = 512, 256
MOST_SPLITS = 16


class Workspace(NamedTuple):
    """Uninitialised but for the counters and document_stop.

    Attributes:
        lse2, delta: float32 [B, Hq, nq], each head's row at a multiple of 16 bytes: lse * log2(e), and
            rowsum(dO * O) - dLSE. The dQ kernel writes both, the dK/dV kernels read them.
        dealt_dq, dealt_text, dealt_summary: int32 [1], 0: work items that specialised kernels have dealt.
        document_stop: int32 [B, rows], the first position after each position's document, for specialised kernels.
        dk_parts, dv_parts, dk_summary_parts, dv_summary_parts: float32 [splits, B, keys, Hkv, D], or None for one part.
        summary_lse2, summary_delta: lse2 and delta of the summary queries, float32 [B, Hq, summary rows], or None where
            `triton_summary` serves those.
    """

    lse2: Tensor
    delta: Tensor
    dealt_dq: Tensor
    dealt_text: Tensor
    dealt_summary: Tensor
    document_stop: Tensor | None
    dk_parts: Tensor | None
    dv_parts: Tensor | None
    dk_summary_parts: Tensor | None
    dv_summary_parts: Tensor | None
    summary_lse2: Tensor | None
    summary_delta: Tensor | None

    @property
    def text_parts(self) -> tuple[Tensor, Tensor] | None:
        """Parts of dK and dV of the text keys."""
        return None if self.dk_parts is None else (self.dk_parts, self.dv_parts)

    @property
    def summary_parts(self) -> tuple[Tensor, Tensor] | None:
        """Parts of dK and dV of the summaries."""
        return None if self.dk_summary_parts is None else (self.dk_summary_parts, self.dv_summary_parts)


def new_dealt(device: torch.device, counters: int = 1) -> tuple[Tensor, ...]:
    """Counters of work items, int32 [1] each, 0."""
    return torch.zeros(counters, dtype=torch.int32, device=device).split(1)


def _splits(q: Tensor, k: Tensor, tile: Tile) -> int:
    """Into how many parts the queries are divided, each with programs of its own (see PROGRAMS)."""
    batch, num_keys, groups, _ = k.shape
    if not num_keys or not q.shape[1]:
        return 1
    programs = triton.cdiv(num_keys, tile.keys * (1 + tile.specialised)) * batch * groups
    wanted = DEALT_PROGRAMS if tile.specialised and q.shape[2] == groups else PROGRAMS
    return min(MOST_SPLITS, triton.cdiv(wanted, programs), triton.cdiv(q.shape[1], tile.queries))


def _parts(q: Tensor, keys: tuple[Tensor, ...], tiles: tuple[Tile, ...]) -> list[tuple[Tensor, Tensor] | None]:
    """Parts of dK and dV of each kind of keys, all in the same memory: one kind is summed before the next is begun."""
    shapes = [(2, _splits(q, k, tile), *k.shape) for k, tile in zip(keys, tiles, strict=True)]
    sizes = [math.prod(shape) if shape[1] > 1 else 0 for shape in shapes]
    memory = torch.empty(max(sizes), dtype=torch.float32, device=q.device) if any(sizes) else None
    return [memory[:size].view(shape).unbind() if size else None for size, shape in zip(sizes, shapes, strict=True)]


def split_strides(gradient: Tensor) -> tuple[int, ...]:
    """Strides of the split, batch, row and head of dK or dV, [B, keys, Hkv, D] or [splits, B, keys, Hkv, D]."""
    return (0, *gradient.stride()[:3]) if gradient.dim() == 4 else gradient.stride()[:4]


def _statistics(batch: int, heads: int, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """lse2 and delta, [batch, heads, rows] each."""
    padded = triton.cdiv(rows, 4) * 4
    return torch.empty((2, batch, heads, padded), dtype=like.dtype, device=like.device)[..., :rows].unbind()


def new_workspace(
    q: Tensor, k: Tensor, k_summary: Tensor, document_start: Tensor | None, lse: Tensor, tiles: Tiles,
    summary_queries: bool = False,
) -> Workspace:  # fmt: skip
    """A workspace for queries [B, nq, Hq, D], text keys and summaries [B, keys, Hkv, D] and lse [B, Hq, nq].

    summary_queries: with their statistics, for kernels that serve the summary queries beside the text queries.
    """
    batch, heads, nq = lse.shape
    document_stop = None
    if document_start is not None and (tiles.dkv_text.specialised or tiles.dkv_summary.specialised):
        document_stop = document_stops(document_start)
    none = (None, None)
    text, summary = (pair or none for pair in _parts(q, (k, k_summary), (tiles.dkv_text, tiles.dkv_summary)))
    summary_statistics = _statistics(batch, heads, k_summary.shape[1], lse) if summary_queries else none
    statistics = _statistics(batch, heads, nq, lse)
    return Workspace(*statistics, *new_dealt(lse.device, 3), document_stop, *text, *summary, *summary_statistics)


def document_stops(document_start: Tensor) -> Tensor:
    """The first position after each position's document: int32 [B, rows], from the first positions, int32 [B, rows]."""
    positions = torch.arange(document_start.shape[1], dtype=torch.int32, device=document_start.device)
    rows = document_start.contiguous()
    return torch.searchsorted(rows, positions.expand_as(rows).contiguous(), right=True, out_int32=True)
