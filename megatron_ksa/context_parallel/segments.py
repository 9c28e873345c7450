"""Operands of the kernels for one context-parallel rank: each segment's attention to itself, and to other segments.

Tensors of rows are [rows, batch, heads, head_dim], those of the kernels [batch, rows, heads, head_dim].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.context_parallel.exchange import Pair
from megatron_ksa.context_parallel.plan import HaloPlan
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import Rows, Sizes, SummaryBackward, SummaryForward


def by_batch(rows: Tensor) -> Tensor:
    """[rows, batch, heads, head_dim] as [batch, rows, heads, head_dim]."""
    return rows.transpose(0, 1)


def no_summaries[Kind: (SummaryForward, SummaryBackward)](kind: type[Kind], text: Tensor) -> Kind:
    """Summary queries of no rows beside text queries."""
    return kind(*[text[:, :0]] * len(kind._fields))


@dataclass(frozen=True)
class Layer:
    """What attention of a rank depends on beside its tensors.

    Attributes:
        plan: which text rows travel.
        gather: some query of the sequence sees a summary.
    """

    geometry: KSAGeometry
    plan: HaloPlan
    gather: bool
    softmax_scale: float

    @property
    def segments(self) -> tuple[int, int]:
        """The rank's segments, by their place in the sequence."""
        return self.plan.split.segments()

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of the text of both segments, then of the summaries of both."""
        text = self.plan.segment_rows
        summaries = rows.shape[0] // 2 - text
        return rows.split([text, text, summaries, summaries])

    def sizes(self, query_start: int = 0, key_start: int = 0) -> Sizes:
        """Sizes of a call whose first summary is that of chunk 0; the kernels divide by S."""
        chunk_size, summary_tokens, window = (
            self.geometry.chunk_size, max(self.geometry.summary_tokens, 1), self.geometry.window_chunks
        )  # fmt: skip
        return Sizes(chunk_size, summary_tokens, window, query_start, key_start, 0, self.softmax_scale)

    def summaries(self, segments: int) -> int:
        """Summary rows of so many segments."""
        return segments * (self.plan.segment_rows // self.geometry.chunk_size * self.geometry.summary_tokens)

    def far_rows(self, place: int) -> int:
        """How many text queries of the rank's segment `place`, from its first on, see anything of other segments."""
        index = self.segments[place]
        return self.plan.segment_rows if self.gather and index else len(self.plan.head(index))

    def new_lse(self, q: Tensor) -> Tensor:
        """Memory for log-sum-exps of text queries [batch, rows, heads, head_dim]."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)


class Rank:
    """The rows of a rank, laid out `[text | summaries]`, each of both segments.

    Attributes:
        text: keys and values of each segment's text.
        summaries: keys and values of the summaries of both.
    """

    def __init__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None) -> None:
        self.layer, self.q, self.k, self.v, self._document_start = layer, q, k, v, document_start
        self._q, self._k, self._v = (layer.split(rows) for rows in (q, k, v))
        self.text: list[Pair] = list(zip(self._k[:2], self._v[:2], strict=True))
        self.summaries: Pair = tuple(rows[2 * layer.plan.segment_rows :] for rows in (k, v))

    def own(self, place: int) -> tuple[Rows, Tensor]:
        """A segment's attention to itself, as of a whole sequence, and the segment's summary queries."""
        starts = self._document_start
        if starts is not None:
            here = self.layer.plan.segment(self.layer.segments[place])
            starts = (starts[:, here.start : here.stop] - here.start).clamp(min=0)
        keys = (by_batch(part) for at in (place, 2 + place) for part in (self._k[at], self._v[at]))
        return Rows(by_batch(self._q[place]), *keys, starts), by_batch(self._q[2 + place])

    def far(self, place: int, halo: Pair, every: Tensor | None) -> tuple[Rows, Sizes]:
        """The attention of a segment's first `Layer.far_rows` queries to other segments.

        Args:
            halo: keys and values before the segment.
            every: of summaries in the order of the sequence, [rows, 2, batch, K/V heads, head_dim], or None.
        """
        layer, index = self.layer, self.layer.segments[place]
        before = tuple(kind[:0] for kind in halo)
        if every is not None:
            before = every[: layer.summaries(index)].unbind(1)
        keys = (by_batch(kind) for kind in (*halo, *before))
        rows = Rows(by_batch(self._q[place][: layer.far_rows(place)]), *keys, self._document_start)
        return rows, layer.sizes(index * layer.plan.segment_rows, layer.plan.halo(index).start)
