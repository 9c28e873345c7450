"""The exchange of text halos and summaries, forward and backward, while attention that needs neither runs.

Two autograd functions make up an exchange. In the forward pass `start` sends and `finish` waits; in the backward pass
`finish` sends the gradients back and `start` waits for them and adds them up. Whatever is computed between the two
overlaps with the communication in both directions. Every rank issues the same collectives in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.plan import HaloPlan, route

Pair = tuple[Tensor, Tensor]


@dataclass
class Exchange:
    """One exchange of one layer, in flight between `start` and `finish`.

    Attributes:
        plan: which text rows go where.
        group: the context-parallel process group.
        gather_summaries: whether any query of the sequence sees a summary.
    """

    plan: HaloPlan
    group: dist.ProcessGroup
    gather_summaries: bool
    _pending: list[dist.Work] = field(default_factory=list)
    _buffers: tuple[Tensor, ...] = ()

    def start(
        self, text: tuple[Pair, Pair], summaries: Pair, parts: Sequence[tuple[int, slice]] = ()
    ) -> tuple[tuple[Pair, Pair], tuple[list[Tensor], list[Tensor]], Pair]:
        """Begin to send.

        Args:
            text: keys and values of this rank's text, of both segments each, [rows, batch, K/V heads, head_dim].
            summaries: keys and values of its summaries, [rows, batch, K/V heads, head_dim].
            parts: segment (0 or 1) and rows in it, which are wanted apart too. A slice's gradient would be as large as
                all keys of the segment.

        Returns:
            Keys and values of both segments, for this rank's own attention, to whose gradients those that come back
            and those of the parts are added; keys and values of the parts; and what is only to be handed to `finish`.
        """
        received, gathered, *rows = _Start.apply(self, parts, *text[0], *text[1], *summaries)
        count = len(parts)
        k_parts, v_parts = rows[4 : 4 + count], rows[4 + count :]
        return ((rows[0], rows[1]), (rows[2], rows[3])), (k_parts, v_parts), (received, gathered)

    def finish(self, in_flight: Pair) -> Pair:
        """Wait for what others sent.

        Returns:
            Text rows of other ranks, in the order of ranks and of `HaloPlan.pieces`, and the summaries of all ranks, in
            the order of ranks (none if no query sees one): keys and values, [rows, 2, batch, K/V heads, head_dim].
        """
        return _Finish.apply(self, *in_flight)

    def _all_to_all(self, rows: Tensor, sizes: list[int], received_sizes: list[int]) -> Tensor:
        """Send rows, laid out by destination, and return the buffer of what will arrive, laid out by source."""
        received = rows.new_empty(sum(received_sizes), *rows.shape[1:])
        if self.plan.halo_rows:
            work = dist.all_to_all_single(received, rows, received_sizes, sizes, group=self.group, async_op=True)
            self._pending.append(work)
        return received

    def _wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, parts: Sequence[tuple[int, slice]], *rows: Tensor):
        *text, k_summary, v_summary = rows
        keys, values = text[:2], text[2:]
        ctx.exchange, ctx.parts = exchange, parts
        way = route(exchange.plan)
        # [rows, 2, batch, K/V heads, head_dim]
        outgoing = keys[0].new_empty(sum(way.outgoing_sizes), 2, *keys[0].shape[1:])
        start = 0
        for segment, part in way.outgoing:
            piece = outgoing[start : start + part.stop - part.start]
            piece[:, 0], piece[:, 1] = keys[segment][part], values[segment][part]
            start += len(piece)
        received = exchange._all_to_all(outgoing, way.outgoing_sizes, way.incoming_sizes)
        gathered, summaries = outgoing.new_empty(0, *outgoing.shape[1:]), None
        if exchange.gather_summaries:
            summaries = torch.stack([k_summary, v_summary], dim=1)
            gathered = summaries.new_empty(summaries.shape[0] * exchange.plan.split.size, *summaries.shape[1:])
            work = dist.all_gather_into_tensor(gathered, summaries, group=exchange.group, async_op=True)
            exchange._pending.append(work)
        exchange._buffers = (outgoing, summaries)
        apart = [kind[segment][part] for kind in (keys, values) for segment, part in parts]
        return received, gathered, *(segment.view_as(segment) for segment in text), *apart

    @staticmethod
    def backward(ctx, _received: Tensor, _gathered: Tensor, *gradients: Tensor):
        exchange, d_summaries = ctx.exchange, None
        # In place: whoever made these gradients handed them to nobody else, and they are as large as all keys.
        d_text, d_parts = gradients[:4], gradients[4:]
        kinds = d_text[:2], d_text[2:]
        places = [(kind, segment, part) for kind in kinds for segment, part in ctx.parts]
        for (kind, segment, part), gradient in zip(places, d_parts, strict=True):
            kind[segment][part] += gradient
        exchange._wait()
        if exchange._buffers:
            _, returned, _, d_summaries = exchange._buffers
            exchange._buffers = ()
            start = 0
            for segment, part in route(exchange.plan).outgoing:
                # [rows, 2, batch, K/V heads, head_dim]
                piece = returned[start : start + part.stop - part.start]
                for kind, gradient in zip(kinds, piece.unbind(1), strict=True):
                    kind[segment][part] += gradient
                start += len(piece)
        return None, None, *d_text, *((None, None) if d_summaries is None else d_summaries.unbind(1))


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, received: Tensor, gathered: Tensor):
        exchange._wait()
        exchange._buffers = ()
        ctx.exchange = exchange
        return received.view_as(received), gathered.view_as(gathered)

    @staticmethod
    def backward(ctx, d_received: Tensor, d_gathered: Tensor):
        exchange = ctx.exchange
        d_received, d_gathered = d_received.contiguous(), d_gathered.contiguous()
        rows, d_summaries = route(exchange.plan), None
        returned = exchange._all_to_all(d_received, rows.incoming_sizes, rows.outgoing_sizes)
        if exchange.gather_summaries:
            d_summaries = d_gathered.new_empty(d_gathered.shape[0] // exchange.plan.split.size, *d_gathered.shape[1:])
            work = dist.reduce_scatter_tensor(d_summaries, d_gathered, group=exchange.group, async_op=True)
            exchange._pending.append(work)
        exchange._buffers = (d_received, returned, d_gathered, d_summaries)
        return None, d_received, d_gathered
