"""Which rows of text K/V travel from which context-parallel rank to which, in one layer.

Text query i sees the text of its chunk and of W chunks before it, so a segment that begins at position p needs, beside
its own rows, the halo [p - W * C, p). The halo may span several segments of several ranks; with W * C >= n it is all
that comes before the segment, which is what full attention needs. Positions are those of the whole sequence's text.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.zigzag import ZigZag


@dataclass(frozen=True)
class HaloPlan:
    """Rows that the ranks of a zig-zag split exchange.

    Attributes:
        split: the zig-zag split and this rank's place in it.
        segment_rows: text rows of a segment, n / (2 * size).
        halo_rows: W * C, text rows before its segment that a segment needs.
    """

    split: ZigZag
    segment_rows: int
    halo_rows: int

    @classmethod
    def of(cls, geometry: KSAGeometry, text_length: int, split: ZigZag) -> "HaloPlan":
        """The plan of a layer for a sequence of text_length tokens, a multiple of 2 * size chunks."""
        halo_rows = min(geometry.window_chunks * geometry.chunk_size, text_length)
        return cls(split, text_length // (2 * split.size), halo_rows)

    def segment(self, index: int) -> range:
        """Text positions of a segment."""
        return range(index * self.segment_rows, (index + 1) * self.segment_rows)

    def halo(self, index: int) -> range:
        """Text positions before segment `index` that its queries see."""
        start = index * self.segment_rows
        return range(max(0, start - self.halo_rows), start)

    def head(self, index: int) -> range:
        """Text positions of segment `index` whose queries see its halo; later queries see none of it."""
        start = index * self.segment_rows
        return range(start, start + min(self.halo_rows, self.segment_rows) * (index > 0))

    def needed(self, rank: int) -> list[range]:
        """The halos of both segments of a rank in order, as one where they meet; no row occurs twice."""
        first, second = (self.halo(index) for index in self.split.segments(rank))
        if first and first.stop >= second.start:
            return [range(min(first.start, second.start), second.stop)]
        return [halo for halo in (first, second) if halo]

    def pieces(self, source: int, destination: int) -> list[range]:
        """What `destination` needs of the rows that `source` holds, by segment and in order."""
        overlaps = [
            _intersection(self.segment(segment), halo)
            for segment in self.split.segments(source)
            for halo in self.needed(destination)
        ]
        return [rows for rows in overlaps if rows]

    def sources(self, rank: int) -> list[list[tuple[int, range]]]:
        """For each needed halo of a rank, the pieces that make it up in order, and the rank that holds each."""
        owner = {segment: source for source in range(self.split.size) for segment in self.split.segments(source)}
        return [
            [
                (owner[segment], _intersection(self.segment(segment), halo))
                for segment in range(halo.start // self.segment_rows, (halo.stop - 1) // self.segment_rows + 1)
            ]
            for halo in self.needed(rank)
        ]

    def held(self, rank: int, rows: range) -> tuple[int, slice]:
        """Which of its two segments of `rank` holds `rows` (all of one segment), and where in it."""
        segment = rows.start // self.segment_rows
        start = segment * self.segment_rows
        return self.split.segments(rank).index(segment), slice(rows.start - start, rows.stop - start)

    def rows_sent(self, rank: int) -> int:
        """Text rows that `rank` sends to others."""
        others = (other for other in range(self.split.size) if other != rank)
        return sum(len(piece) for other in others for piece in self.pieces(rank, other))

    def rows_received(self, rank: int) -> int:
        """Text rows that `rank` receives from others, whose gradients it sends back."""
        others = (other for other in range(self.split.size) if other != rank)
        return sum(len(piece) for other in others for piece in self.pieces(other, rank))


class Place(NamedTuple):
    """Where a segment's halo lies: `rows` of this rank's own segment 0 or 1, or of a tensor that is kept for it."""

    own: bool
    index: int
    rows: slice


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, the same for every layer with the same plan.

    Attributes:
        outgoing: rows to send, as `HaloPlan.held` says where they are, by destination.
        outgoing_sizes: number of rows for each destination.
        incoming: text positions that arrive, by source.
        incoming_sizes: number of rows from each source.
        joined: some halo is made up of several pieces, and halos are copied together; otherwise each is used where it
            lies, in what has arrived or among the rank's own rows.
        places: of both segments' halos, None where a segment has none. Kept are the joined halos in the order of
            `HaloPlan.needed`, or what has arrived.
    """

    outgoing: list[tuple[int, slice]]
    outgoing_sizes: list[int]
    incoming: list[range]
    incoming_sizes: list[int]
    joined: bool
    places: tuple[Place | None, Place | None]

    @property
    def overlap(self) -> bool:
        """Whether both halos are parts of one kept tensor that share rows."""
        first, second = self.places
        return bool(self.joined and first and first.index == second.index and first.rows.stop > second.rows.start)


@lru_cache
def route(plan: HaloPlan) -> Route:
    """The rows that this rank exchanges with each one."""
    me = plan.split.rank
    to = [plan.pieces(me, other) if other != me else [] for other in range(plan.split.size)]
    back = [plan.pieces(other, me) if other != me else [] for other in range(plan.split.size)]
    incoming = [piece for pieces in back for piece in pieces]
    joined = any(len(pieces) > 1 for pieces in plan.sources(me))
    return Route(
        outgoing=[plan.held(me, piece) for pieces in to for piece in pieces],
        outgoing_sizes=[sum(map(len, pieces)) for pieces in to],
        incoming=incoming,
        incoming_sizes=[sum(map(len, pieces)) for pieces in back],
        joined=joined,
        places=tuple(_place(plan, plan.halo(index), incoming, joined) for index in plan.split.segments()),
    )


def _place(plan: HaloPlan, halo: range, incoming: list[range], joined: bool) -> Place | None:
    if not halo:
        return None
    if joined:
        for index, rows in enumerate(plan.needed(plan.split.rank)):
            if rows.start <= halo.start and halo.stop <= rows.stop:
                return Place(False, index, slice(halo.start - rows.start, halo.stop - rows.start))
    if halo not in incoming:
        return Place(True, *plan.held(plan.split.rank, halo))
    before = sum(map(len, incoming[: incoming.index(halo)]))
    return Place(False, 0, slice(before, before + len(halo)))


def sees_summaries(geometry: KSAGeometry, text_length: int) -> bool:
    """Whether the window leaves any chunk of a sequence of text_length tokens to its summaries."""
    return bool(geometry.summary_tokens) and text_length // geometry.chunk_size > geometry.window_chunks + 1


def _intersection(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
