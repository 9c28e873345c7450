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

    def head(self, index: int) -> range:
        """Text positions of segment `index` whose queries see its halo; those of later queries begin in the segment."""
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


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, the same for every layer with the same plan.

    Attributes:
        outgoing: rows to send, as `HaloPlan.held` says where they are, by destination.
        outgoing_sizes: number of rows for each destination.
        incoming: text positions that arrive, by source.
        incoming_sizes: number of rows from each source.
        own: text positions that this rank's halos have in its own segments, which are not sent.
    """

    outgoing: list[tuple[int, slice]]
    outgoing_sizes: list[int]
    incoming: list[range]
    incoming_sizes: list[int]
    own: list[range]


@lru_cache
def route(plan: HaloPlan) -> Route:
    """The rows that this rank exchanges with each one."""
    me = plan.split.rank
    to = [plan.pieces(me, other) if other != me else [] for other in range(plan.split.size)]
    back = [plan.pieces(other, me) if other != me else [] for other in range(plan.split.size)]
    return Route(
        outgoing=[plan.held(me, piece) for pieces in to for piece in pieces],
        outgoing_sizes=[sum(map(len, pieces)) for pieces in to],
        incoming=[piece for pieces in back for piece in pieces],
        incoming_sizes=[sum(map(len, pieces)) for pieces in back],
        own=plan.pieces(me, me),
    )


def sees_summaries(geometry: KSAGeometry, text_length: int) -> bool:
    """Whether the window leaves any chunk of a sequence of text_length tokens to its summaries."""
    return bool(geometry.summary_tokens) and text_length // geometry.chunk_size > geometry.window_chunks + 1


def fewest_passes(geometry: KSAGeometry, text_length: int, size: int, heads: int, kv_heads: int) -> int:
    """How often the text queries of a rank should attend: 1 where the exchange is small, otherwise 2.

    In two passes the attention to own rows runs while the exchange is under way, and every query is read, attends and
    is written a second time. One pass waits for the exchange, which costs less than the second pass where a rank
    receives no more keys than it has queries,

        (halos of both segments + summaries of other ranks) * kv_heads <= text rows * heads

    and where a halo is shorter than a segment: otherwise a rank's own keys would be copied behind their halo.

    Args:
        size: context-parallel size.
        heads, kv_heads: of one tensor-parallel rank.
    """
    halo_rows = min(geometry.window_chunks * geometry.chunk_size, text_length)
    received = 2 * halo_rows
    if sees_summaries(geometry, text_length):
        received += text_length // geometry.chunk_size * geometry.summary_tokens // size * (size - 1)
    short = halo_rows < text_length // (2 * size)
    return 1 if short and received * kv_heads <= text_length // size * heads else 2


def _intersection(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
