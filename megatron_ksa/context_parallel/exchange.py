"""The exchange of text halos and summaries between ranks, and that of their gradients, while attention runs.

`send` and `send_back` begin, `receive` and `receive_back` wait: what is computed between the two overlaps with the
communication. Every rank issues the same collectives in the same order.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.plan import HaloPlan, route

Pair = tuple[Tensor, Tensor]


class Exchange:
    """One exchange of one layer, forward or backward.

    Args:
        plan: which text rows go where.
        group: the context-parallel process group.
        gather_summaries: whether any query of the sequence sees a summary.
    """

    def __init__(self, plan: HaloPlan, group: dist.ProcessGroup, gather_summaries: bool) -> None:
        self.plan, self.group, self.gather_summaries = plan, group, gather_summaries
        self._pending: list[dist.Work] = []
        # Of text and of summaries: what is sent, which must live until it has been, and what arrives.
        self._text: Pair | None = None
        self._summaries: Pair | None = None

    def send(self, text: Sequence[Pair], summaries: Pair) -> None:
        """Begin to send halos and summaries.

        Args:
            text: keys and values of both segments' text, [rows, batch, K/V heads, head_dim].
            summaries: keys and values of this rank's summaries, [rows, batch, K/V heads, head_dim].
        """
        way, like = route(self.plan), text[0][0]
        # [rows, 2, batch, K/V heads, head_dim]
        outgoing = like.new_empty(sum(way.outgoing_sizes), 2, *like.shape[1:])
        pieces = outgoing.split([part.stop - part.start for _, part in way.outgoing]) if way.outgoing else ()
        for (segment, part), piece in zip(way.outgoing, pieces, strict=True):
            for place, kind in enumerate(text[segment]):
                piece[:, place] = kind[part]
        self._all_to_all(outgoing, way.outgoing_sizes, way.incoming_sizes)
        if self.gather_summaries:
            own = torch.stack(summaries, dim=1)
            every = own.new_empty(own.shape[0] * self.plan.split.size, *own.shape[1:])
            self._pending.append(dist.all_gather_into_tensor(every, own, group=self.group, async_op=True))
            self._summaries = own, every

    def receive(self) -> tuple[Tensor, Tensor | None]:
        """Wait for what others sent.

        Returns:
            Text rows of other ranks, in the order of `Route.incoming`, and the summaries of all ranks, in the order of
            ranks (None if no query sees one): keys and values, [rows, 2, batch, K/V heads, head_dim].
        """
        return self._wait()

    def send_back(self, d_received: Tensor, d_every: Tensor | None) -> None:
        """Begin to send the gradients of what `receive` returned, in the same order."""
        way = route(self.plan)
        self._all_to_all(d_received, way.incoming_sizes, way.outgoing_sizes)
        if self.gather_summaries:
            own = d_every.new_empty(d_every.shape[0] // self.plan.split.size, *d_every.shape[1:])
            self._pending.append(dist.reduce_scatter_tensor(own, d_every, group=self.group, async_op=True))
            self._summaries = d_every, own

    def receive_back(self, d_text: Sequence[Pair], d_summaries: Pair) -> None:
        """Wait, and add the gradients that come back to those of `send`'s arguments."""
        returned, own = self._wait()
        start = 0
        for segment, part in route(self.plan).outgoing:
            piece = returned[start : start + part.stop - part.start]
            add_pair(d_text[segment], part, piece)
            start += len(piece)
        if own is not None:
            add_pair(d_summaries, slice(None), own)

    def _all_to_all(self, rows: Tensor, sizes: list[int], received_sizes: list[int]) -> None:
        """Send rows, laid out by destination; what arrives is laid out by source."""
        received = rows.new_empty(sum(received_sizes), *rows.shape[1:])
        if self.plan.halo_rows:
            work = dist.all_to_all_single(received, rows, received_sizes, sizes, group=self.group, async_op=True)
            self._pending.append(work)
        self._text = rows, received

    def _wait(self) -> tuple[Tensor, Tensor | None]:
        for work in self._pending:
            work.wait()
        (_, text), summaries = self._text, self._summaries
        self._pending, self._text, self._summaries = [], None, None
        return text, None if summaries is None else summaries[1]


def add_pair(pair: Pair, rows: slice, gradients: Tensor) -> None:
    """Add gradients [rows, 2, ...] of keys and values to rows of those of both."""
    for total, gradient in zip(pair, gradients.unbind(1), strict=True):
        # `total[rows] += gradient` would copy the sum onto itself once more.
        total[rows].add_(gradient)
