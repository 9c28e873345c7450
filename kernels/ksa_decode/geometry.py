"""Where the keys and values of a layer lie while a sequence is decoded, and which of them a token sees."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheGeometry:
    """Rows of one sequence in a layer's cache: a ring of text rows, then summary rows (KSA report, arXiv 2604.24432).

    Text position p has row p % ring, so that a token takes the row of the one that leaves its window. Summary (c, s)
    has row ring + c * S + s. With W = ring / C - 1, the query at position i sees

        ring row r            iff r <= i and not i % ring < r < (i % ring) // C * C + C   (the rest of its chunk is old)
        summary row (c, s)    iff c < i // C - W

    which is KSA's visibility. A ring of at least the longest sequence never turns: causal attention. Without summary
    rows what is older than the window is not seen. A ring may have room for more than the window, for passes of several
    tokens that must not overwrite what their first one sees; then W is given, and row r is seen iff the token that it
    holds, (i - r) % ring tokens ago, is at most i % C + W * C tokens old.

    Attributes:
        chunk_size: C; 1 for causal attention.
        summary_tokens: S, summaries of each chunk that the cache has rows for.
        ring: text rows, a multiple of C: (W + 1) * C of a window, or more.
        summaries: summary rows, or 0.
        window: W where the ring has more rows than the window needs, else None.
    """

    chunk_size: int
    summary_tokens: int
    ring: int
    summaries: int
    window: int | None = None

    @property
    def rows(self) -> int:
        """Text and summary rows."""
        return self.ring + self.summaries

    @property
    def window_chunks(self) -> int:
        """W, past chunks whose text a query sees."""
        return self.ring // self.chunk_size - 1 if self.window is None else self.window

    def visible(self, position: int) -> tuple[int, Tensor]:
        """Rows that the text query at a position sees.

        Returns:
            The number of rows from row 0 on, and bool [those rows], True for those among them that are left out.
        """
        turned = position >= self.ring
        summaries = max((position // self.chunk_size - self.window_chunks) * self.summary_tokens, 0)
        age = (position - torch.arange(self.ring if turned else position + 1)) % self.ring
        hidden = age > position % self.chunk_size + self.window_chunks * self.chunk_size
        if not turned and summaries:
            # Unwritten rows of the ring lie before the summaries.
            hidden = torch.cat([hidden, torch.ones(self.ring - len(hidden), dtype=torch.bool)])
        if summaries:
            hidden = torch.cat([hidden, torch.zeros(min(summaries, self.summaries), dtype=torch.bool)])
        return len(hidden), hidden
