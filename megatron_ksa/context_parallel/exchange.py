"""The exchange of text halos and summaries, forward and backward, while attention that needs neither runs.

Two autograd functions make up an exchange. In the forward pass `start` sends and `finish` waits; in the backward pass
`finish` sends the gradients back and `start` waits for them and adds them up. Whatever is computed between the two
overlaps with the communication in both directions. Every rank issues the same collectives in the same order.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.plan import HaloPlan, route


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

    def start(self, text: tuple[Tensor, Tensor], summaries: tuple[Tensor, Tensor]) -> tuple[tuple, tuple]:
        """Begin to send.

        Args:
            text, summaries: keys and values of this rank's rows, [rows, batch, K/V heads, head_dim] each.

        Returns:
            Text keys and values, for this rank's own attention, to whose gradients those that come back are added; and
            what is only to be handed to `finish`.
        """
        received, gathered, k, v = _Start.apply(self, *text, *summaries)
        return (k, v), (received, gathered)

    def finish(self, in_flight: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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
    def forward(ctx, exchange: Exchange, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor):
        ctx.exchange = exchange
        rows = route(exchange.plan)
        nothing = k.new_empty(0, 2, *k.shape[1:])
        outgoing = torch.cat([nothing, *(torch.stack([k[part], v[part]], dim=1) for part in rows.outgoing)])
        received = exchange._all_to_all(outgoing, rows.outgoing_sizes, rows.incoming_sizes)
        gathered, summaries = nothing, None
        if exchange.gather_summaries:
            summaries = torch.stack([k_summary, v_summary], dim=1)
            gathered = summaries.new_empty(summaries.shape[0] * exchange.plan.split.size, *summaries.shape[1:])
            work = dist.all_gather_into_tensor(gathered, summaries, group=exchange.group, async_op=True)
            exchange._pending.append(work)
        exchange._buffers = (outgoing, summaries)
        return received, gathered, k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, _received: Tensor, _gathered: Tensor, d_k: Tensor, d_v: Tensor):
        exchange = ctx.exchange
        exchange._wait()
        _, returned, _, d_summaries = exchange._buffers
        exchange._buffers = ()
        start = 0
        for rows in route(exchange.plan).outgoing:
            # [rows, 2, batch, K/V heads, head_dim]
            piece = returned[start : start + rows.stop - rows.start]
            # In place: whoever made these gradients handed them to nobody else, and they are as large as all keys.
            d_k[rows] += piece[:, 0]
            d_v[rows] += piece[:, 1]
            start += len(piece)
        return None, d_k, d_v, *((None, None) if d_summaries is None else d_summaries.unbind(1))


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
