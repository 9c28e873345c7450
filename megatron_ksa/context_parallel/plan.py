"""Which rows of text K/V travel from which context-parallel rank to which, in one layer.

Text query i sees the text of its chunk and of W chunks before it, so a segment that begins at position p needs, beside
its own rows, the halo [p - W * C, p). The halo may span several segments of several ranks; with W * C >= n it is all
that comes before the segment, which is what full attention needs. Positions are those of the whole sequence's text.
"""

from dataclasses import dataclass
from functools import lru_cache

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

    def held(self, rank: int, rows: range) -> slice:
        """Where `rank` holds `rows` (within one segment of its own) among its text rows."""
        segment = rows.start // self.segment_rows
        shift = self.split.segments(rank).index(segment) * self.segment_rows - segment * self.segment_rows
        return slice(rows.start + shift, rows.stop + shift)

    def rows_sent(self, rank: int) -> int:
        """Text rows that `rank` sends to others."""
        others = (other for other in range(self.split.size) if other != rank)
        return sum(len(piece) for other in others for piece in self.pieces(rank, other))

    def rows_received(self, rank: int) -> int:
        """Text rows that `rank` receives from others, whose gradients it sends back."""
        others = (other for other in range(self.split.size) if other != rank)
        return sum(len(piece) for other in others for piece in self.pieces(other, rank))


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, itself included, the same for every layer with the same plan.

    Attributes:
        outgoing: rows to send among this rank's text rows, by destination.
        outgoing_sizes: number of rows for each destination.
        incoming: text positions that arrive, by source.
        incoming_sizes: number of rows from each source.
    """

    outgoing: list[slice]
    outgoing_sizes: list[int]
    incoming: list[range]
    incoming_sizes: list[int]


@lru_cache
def route(plan: HaloPlan) -> Route:
    """The rows that this rank exchanges with each one.

    What it needs of its own other segment takes the same way: as a slice of its keys it would have a gradient as large
    as all of them.
    """
    me = plan.split.rank
    to = [plan.pieces(me, other) for other in range(plan.split.size)]
    back = [plan.pieces(other, me) for other in range(plan.split.size)]
    return Route(
        outgoing=[plan.held(me, piece) for pieces in to for piece in pieces],
        outgoing_sizes=[sum(map(len, pieces)) for pieces in to],
        incoming=[piece for pieces in back for piece in pieces],
        incoming_sizes=[sum(map(len, pieces)) for pieces in back],
    )


def sees_summaries(geometry: KSAGeometry, text_length: int) -> bool:
    """Whether the window leaves any chunk of a sequence of text_length tokens to its summaries."""
    return bool(geometry.summary_tokens) and text_length // geometry.chunk_size > geometry.window_chunks + 1


def _intersection(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
