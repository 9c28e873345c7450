"""The exchange of text halos and summaries, forward and backward, while attention that needs neither runs.

Two autograd functions make up an exchange. In the forward pass `start` sends and `finish` waits; in the backward pass
`finish` sends the gradients back and `start` waits for them and adds them up. Whatever is computed between the two
overlaps with the communication in both directions. Every rank issues the same collectives in the same order.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.plan import HaloPlan


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

    def start(self, text: tuple[Tensor, Tensor], summaries: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Begin to send; the result is only to be handed to `finish`.

        Args:
            text, summaries: keys and values of this rank's rows, [rows, batch, K/V heads, head_dim] each.
        """
        return _Start.apply(self, *text, *summaries)

    def finish(self, in_flight: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Wait for what others sent.

        Returns:
            Text rows of other ranks, in the order of ranks and of `HaloPlan.pieces`, and the summaries of all ranks, in
            the order of ranks (none if no query sees one): keys and values, [rows, 2, batch, K/V heads, head_dim].
        """
        return _Finish.apply(self, *in_flight)

    def _pieces(self, incoming: bool) -> list[list[range]]:
        """What comes from each rank, or goes to it; nothing for this rank itself."""
        me, size = self.plan.split.rank, self.plan.split.size
        pairs = ((other, me) if incoming else (me, other) for other in range(size))
        return [[] if a == b else self.plan.pieces(a, b) for a, b in pairs]

    def incoming(self) -> list[range]:
        """The pieces that arrive, in the order of the received rows."""
        return list(itertools.chain(*self._pieces(incoming=True)))

    def _split_sizes(self, incoming: bool) -> list[int]:
        return [sum(map(len, pieces)) for pieces in self._pieces(incoming)]

    def _all_to_all(self, rows: Tensor, backwards: bool) -> Tensor:
        """Send rows, laid out by destination, and return the buffer of what will arrive, laid out by source."""
        to, back = self._split_sizes(incoming=backwards), self._split_sizes(incoming=not backwards)
        received = rows.new_empty(sum(back), *rows.shape[1:])
        if self.plan.halo_rows:
            self._pending.append(dist.all_to_all_single(received, rows, back, to, group=self.group, async_op=True))
        return received

    def _wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor):
        me = exchange.plan.split.rank
        ctx.exchange, ctx.text_shape = exchange, k.shape
        ctx.held = [exchange.plan.held(me, piece) for piece in itertools.chain(*exchange._pieces(incoming=False))]
        outgoing = [torch.stack([k[rows], v[rows]], dim=1) for rows in ctx.held]
        nothing = k.new_empty(0, 2, *k.shape[1:])
        outgoing = torch.cat([nothing, *outgoing])
        received = exchange._all_to_all(outgoing, backwards=False)
        gathered, own = nothing, None
        if exchange.gather_summaries:
            own = torch.stack([k_summary, v_summary], dim=1)
            gathered = own.new_empty(own.shape[0] * exchange.plan.split.size, *own.shape[1:])
            work = dist.all_gather_into_tensor(gathered, own, group=exchange.group, async_op=True)
            exchange._pending.append(work)
        exchange._buffers = (outgoing, own)
        return received, gathered

    @staticmethod
    def backward(ctx, *_):
        exchange = ctx.exchange
        exchange._wait()
        _, returned, _, d_own = exchange._buffers
        exchange._buffers = ()
        # [2, rows, batch, K/V heads, head_dim]
        d_text = returned.new_zeros(2, *ctx.text_shape)
        start = 0
        for rows in ctx.held:
            stop = start + rows.stop - rows.start
            d_text[:, rows] += returned[start:stop].transpose(0, 1)
            start = stop
        d_summary = (None, None) if d_own is None else d_own.unbind(1)
        return None, *d_text.unbind(0), *d_summary


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
        returned, d_own = exchange._all_to_all(d_received, backwards=True), None
        if exchange.gather_summaries:
            d_own = d_gathered.new_empty(d_gathered.shape[0] // exchange.plan.split.size, *d_gathered.shape[1:])
            work = dist.reduce_scatter_tensor(d_own, d_gathered, group=exchange.group, async_op=True)
            exchange._pending.append(work)
        exchange._buffers = (d_received, returned, d_gathered, d_own)
        return None, d_received, d_gathered
