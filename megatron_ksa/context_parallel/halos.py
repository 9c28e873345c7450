"""Keys and values before a rank's segments: where they lie, and where their gradients go.

A halo that one rank holds is used where it lies: among what has arrived, or among the rank's own rows. Only where some
halo is made up of several pieces are the pieces copied together. Tensors of keys and values together are
[rows, 2, batch, K/V heads, head_dim].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ksa.context_parallel.exchange import Pair, add_pair
from megatron_ksa.context_parallel.plan import HaloPlan, route


def kept_for_halos(plan: HaloPlan, received: Tensor, own: Sequence[Pair]) -> list[Tensor]:
    """Tensors in which the halos lie that are not among the rank's own rows.

    Args:
        received: what has arrived, in the order of `Route.incoming`.
        own: keys and values of both segments' text, [rows, batch, K/V heads, head_dim].
    """
    if not route(plan).joined:
        return [received]
    kept = [received.new_empty(len(rows), *received.shape[1:]) for rows in plan.needed(plan.split.rank)]
    for joined, other, held in _pieces(plan, kept, received):
        if held is None:
            joined.copy_(other)
            continue
        segment, part = held
        for place, kind in enumerate(own[segment]):
            joined[:, place] = kind[part]
    return kept


def halo_of(plan: HaloPlan, place: int, kept: Sequence[Tensor], own: Sequence[Pair]) -> Pair:
    """Keys and values before the rank's segment `place`, 0 or 1, [rows, batch, K/V heads, head_dim]; maybe no rows."""
    where = route(plan).places[place]
    if where is None:
        return tuple(kind[:0] for kind in own[place])
    if where.own:
        return tuple(kind[where.rows] for kind in own[where.index])
    return kept[where.index][where.rows].unbind(1)


class HaloGradients:
    """Gradients of both halos, which are to be filled before anything else is asked for.

    Args:
        kept: of `kept_for_halos`.
    """

    def __init__(self, plan: HaloPlan, kept: Sequence[Tensor]) -> None:
        self._plan, self._way = plan, route(plan)
        self._kept = [torch.empty_like(rows) for rows in kept]
        # By segment, where the halo's gradients are added to what is elsewhere.
        self._apart: dict[int, Tensor] = {}

    def of(self, place: int) -> Tensor:
        """Memory for the gradients of keys and values before the rank's segment `place`; maybe no rows."""
        where, kept = self._way.places[place], self._kept[0]
        if where is None:
            return kept[:0]
        if not where.own and not (place == 0 and self._way.overlap):
            return self._kept[where.index][where.rows]
        self._apart[place] = kept.new_empty(where.rows.stop - where.rows.start, *kept.shape[1:])
        return self._apart[place]

    def returned(self) -> Tensor:
        """The gradients of what has arrived, in the order of `Route.incoming`."""
        if self._way.overlap:
            first, second = self._way.places
            both = self._kept[second.index]  # the second halo filled it but for its beginning
            both[: second.rows.start].zero_()
            both[first.rows].add_(self._apart.pop(0))
        if not self._way.joined:
            return self._kept[0]
        received = self._kept[0].new_empty(sum(self._way.incoming_sizes), *self._kept[0].shape[1:])
        for joined, other, held in _pieces(self._plan, self._kept, received):
            if held is None:
                other.copy_(joined)
        return received

    def add_own(self, d_text: Sequence[Pair]) -> None:
        """Add the gradients of what this rank's halos have in its own segments to those of both segments' text."""
        for place, gradients in self._apart.items():
            where = self._way.places[place]
            add_pair(d_text[where.index], where.rows, gradients)
        if self._way.joined:
            for joined, _, held in _pieces(self._plan, self._kept, None):
                if held is not None:
                    segment, part = held
                    add_pair(d_text[segment], part, joined)


def _pieces(
    plan: HaloPlan, kept: Sequence[Tensor], received: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, slice] | None]]:
    """Of joined halos, each piece's rows there, and its rows in `received` or its place among the rank's own."""
    way, me = route(plan), plan.split.rank
    sizes = [len(piece) for piece in way.incoming]
    arrived = dict(zip(way.incoming, received.split(sizes), strict=True)) if received is not None and sizes else {}
    for joined, pieces in zip(kept, plan.sources(me), strict=True):
        parts = joined.split([len(piece) for _, piece in pieces])
        for part, (owner, piece) in zip(parts, pieces, strict=True):
            yield part, arrived.get(piece), plan.held(me, piece) if owner == me else None
