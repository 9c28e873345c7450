"""KSA attention of one context-parallel rank: its own segments, the halos before them, and summaries of all ranks.

The text queries of a segment attend in two passes or in one. Two passes attend to the segment while the exchange is
under way and then to what it brought; the two results are merged by their log-sum-exps (exactly the softmax over both).
One pass waits for the exchange: queries whose window reaches before the segment attend to the halo and the rows behind
it as one run of keys, all later ones to the segment where it lies, each in one softmax with the summaries. The first
segment of a sequence needs nothing of other ranks and never waits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.exchange import Exchange, Pair
from megatron_ksa.context_parallel.plan import HaloPlan, fewest_passes, route, sees_summaries
from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_summary_attention, ksa_text_attention
from megatron_ksa.kernels.softmax_merge import merge
from megatron_ksa.layout.zigzag import ZigZag

# Passes of every layer (`--cp-attention-passes`); None leaves them to `fewest_passes`.
_passes: int | None = None


def take_passes(passes: str) -> None:
    """From now on, let text queries attend in so many passes: 1, 2 or auto."""
    global _passes
    _passes = None if passes == "auto" else int(passes)


# Text queries, keys and values, those of summaries, positions of the first query and key -> output and log-sum-exp.
_Attend = Callable[[Tensor, Pair, Pair, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Segment:
    """Rows of one of a rank's segments, [batch, rows, heads, head_dim] each.

    Attributes:
        start: position of its first token.
        q_head: in one pass, the queries that see the halo; otherwise no rows.
        q_tail: the other text queries.
        keys: keys and values of its text.
    """

    start: int
    q_head: Tensor
    q_tail: Tensor
    keys: Pair

    @property
    def none(self) -> Pair:
        """Keys and values of no rows."""
        k, v = self.keys
        return k[:, :0], v[:, :0]

    def to_itself(self, attend: _Attend, summaries: Pair) -> tuple[Tensor, Tensor]:
        """Attention of all queries to the segment's text and to summaries."""
        return attend(self.q_tail, self.keys, summaries, self.start, self.start)

    def in_one_pass(self, attend: _Attend, joined: Pair | None, halo_start: int, summaries: Pair) -> list[Tensor]:
        """Outputs of the queries in order.

        Args:
            joined: keys and values of the halo, which begins at halo_start, and of the segment's head.
        """
        text, head_rows = [], self.q_head.shape[1]
        if joined is not None:
            text.append(attend(self.q_head, joined, summaries, self.start, halo_start)[0])
        if self.q_tail.shape[1]:
            text.append(attend(self.q_tail, self.keys, summaries, self.start + head_rows, self.start)[0])
        return text

    def merged(
        self, attend: _Attend, near: tuple[Tensor, Tensor], halo: Pair | None, halo_start: int, summaries: Pair
    ) -> Tensor:
        """Output of the second pass, to halo and summaries, merged with the first one's `near`."""
        return merge(*near, *attend(self.q_tail, halo or self.none, summaries, self.start, halo_start))


def _halos(plan: HaloPlan, received: Tensor, own: list[Tensor], heads: list[list[Tensor]]) -> list[Tensor | None]:
    """Keys (or values) before each of this rank's segments that its queries see, with the segment's head behind them.

    Args:
        received, own: rows of other ranks and of this one, as in `Route`, [rows, batch, K/V heads, head_dim].
        heads: of each segment, its first rows, or nothing where none are wanted.
    """
    way = route(plan)
    if not way.incoming:
        return [None, None]
    # One split, and not a slice for each piece, since each slice's gradient would be as large as the whole.
    arrived = dict(zip(way.incoming, received.split([len(piece) for piece in way.incoming]), strict=True))
    arrived |= zip(way.own, own, strict=True)
    needed = [[arrived[piece] for _, piece in pieces] for pieces in plan.sources(plan.split.rank)]
    halos = [plan.halo(segment) for segment in plan.split.segments()]
    meet = all(halos) and len(needed) == 1
    if meet:
        rows, start = torch.cat(needed[0]), halos[0].start
        needed = [[rows[halo.start - start : halo.stop - start]] for halo in halos]
    found = iter(needed)
    pieces = [[*next(found), *head] if halo else [] for halo, head in zip(halos, heads, strict=True)]
    # Parts of one run of rows share its memory; what has arrived is copied, so that its buffer is free again.
    return [(each[0] if meet and len(each) == 1 else torch.cat(each)) if each else None for each in pieces]


def _by_segment(heads: list[range], rows: list[Tensor]) -> list[list[Tensor]]:
    """Rows of the heads that there are, by segment."""
    found = iter(rows)
    return [[next(found)] if head else [] for head in heads]


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: KSAGeometry,
    *,
    text_rows: int,
    split: ZigZag,
    group: dist.ProcessGroup,
    document_start: Tensor | None = None,
    softmax_scale: float | None = None,
    passes: int | None = None,
) -> Tensor:
    """KSA attention of this rank's rows, laid out `[text | summaries]`, each of both segments.

    Args:
        q: [rows, batch, heads, head_dim]; text rows then summary rows, or text rows only (full attention, with a window
            over the whole sequence).
        k, v: [rows, batch, K/V heads, head_dim].
        text_rows: text rows of this rank, both segments multiples of the chunk size.
        split: this rank's place in the zig-zag split.
        group: the context-parallel process group.
        document_start: int32 [batch, n] of the whole sequence, or None.
        passes: 1 or 2, in which text queries attend; by default what `take_passes` says.

    Returns:
        [rows, batch, heads, head_dim].
    """
    text_length, rows = text_rows * split.size, text_rows // 2
    plan = HaloPlan.of(geometry, text_length, split)
    passes = passes or _passes or fewest_passes(geometry, text_length, split.size, q.shape[2], k.shape[2])
    summary_rows = (q.shape[0] - text_rows) // 2
    gather = bool(summary_rows) and sees_summaries(geometry, text_length)
    heads = [plan.head(segment) if passes == 1 else range(0) for segment in split.segments()]
    options = {"document_start": document_start, "softmax_scale": softmax_scale}

    def attend(queries: Tensor, keys: Pair, summaries: Pair, query_start: int, key_start: int):
        places = {"query_start": query_start, "key_start": key_start}
        return ksa_text_attention(queries, *keys, *summaries, geometry, **places, **options)

    # Every tensor is split once, so that its gradient is put together once.
    parts = [size for head in heads for size in (len(head), rows - len(head))]
    *q_text, q_first, q_second = (part.transpose(0, 1) for part in q.split([*parts, summary_rows, summary_rows]))
    (*k_text, k_summary), (*v_text, v_summary) = (kind.split([rows, rows, 2 * summary_rows]) for kind in (k, v))
    exchange, own = Exchange(plan, group, gather), route(plan).own
    apart = [plan.held(split.rank, piece) for piece in (*own, *filter(len, heads))]
    text, kinds, in_flight = exchange.start((k_text, v_text), (k_summary, v_summary), apart)

    segments, near, summaries = [], [], []
    for place, (index, q_chunks) in enumerate(zip(split.segments(), (q_first, q_second), strict=True)):
        keys, of_chunks = (
            tuple(kind[place].transpose(0, 1) for kind in pair)
            for pair in (text, (k_summary.chunk(2), v_summary.chunk(2)))
        )
        segment = _Segment(index * rows, *q_text[2 * place : 2 * place + 2], keys)
        segments.append(segment)
        if summary_rows:
            summaries.append(
                ksa_summary_attention(q_chunks, *keys, *of_chunks, geometry, key_start=segment.start, **options)
            )
        if index == 0 or passes == 2:
            own_summaries = index == 0 and gather and sees_summaries(geometry, rows)
            near.append(segment.to_itself(attend, of_chunks if own_summaries else segment.none))

    received, gathered = exchange.finish(in_flight)
    every = tuple(kind.transpose(0, 1) for kind in split.restore(gathered).unbind(1))
    halos = zip(
        *(
            _halos(plan, far, kind[: len(own)], _by_segment(heads, kind[len(own) :]))
            for far, kind in zip(received.unbind(1), kinds, strict=True)
        ),
        strict=True,
    )
    text = []
    for segment, index, halo in zip(segments, split.segments(), halos, strict=True):
        start = plan.halo(index).start
        far = None if halo[0] is None else tuple(kind.transpose(0, 1) for kind in halo)
        if index == 0:
            text.append(near.pop(0)[0])
        elif passes == 1:
            text += segment.in_one_pass(attend, far, start, every)
        else:
            text.append(segment.merged(attend, near.pop(0), far, start, every))
    return torch.cat([*text, *summaries], dim=1).transpose(0, 1)
