"""Where the keys and values of a layer lie while a sequence is decoded, and which of them a token sees."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheGeometry:
    """Rows of one sequence in a layer's cache: a ring of text rows, then summary rows (KSA report, arXiv 2604.24432).

    Text position p has row p % ring, so that a token takes the row of the one that leaves its window. Summary (c, s)
    has row ring + c * S + s. With W = ring / C - 1, the query at position i sees

        ring row r            iff r <= i and not i % ring < r < (i % ring) // C * C + C   (the rest of its chunk is old)
        summary row (c, s)    iff c < i // C - W

    which is KSA's visibility. A ring of at least the longest sequence never turns: causal attention. Without summary
    rows what is older than the window is not seen.

    Attributes:
        chunk_size: C; 1 for causal attention.
        summary_tokens: S, summaries of each chunk that the cache has rows for.
        ring: text rows, a multiple of C: (W + 1) * C of a window.
        summaries: summary rows, or 0.
    """

    chunk_size: int
    summary_tokens: int
    ring: int
    summaries: int

    @property
    def rows(self) -> int:
        """Text and summary rows."""
        return self.ring + self.summaries

    @property
    def window_chunks(self) -> int:
        """W, past chunks whose text the ring holds."""
        return self.ring // self.chunk_size - 1

    def visible(self, position: int) -> tuple[int, slice]:
        """Rows that the text query at a position sees.

        Returns:
            The number of rows from row 0 on, and those among them that are left out.
        """
        if position < self.ring:
            return position + 1, slice(0, 0)
        row, chunk = position % self.ring, position // self.chunk_size
        seen = min((chunk - self.window_chunks) * self.summary_tokens, self.summaries)
        return self.ring + seen, slice(row + 1, (row // self.chunk_size + 1) * self.chunk_size)
