"""The one place that knows which rows are text and which are summaries, and which positions they have.

Rows of a shard are laid out `[text | summaries]`: its n text rows, then S summary rows for each of its complete chunks
in order. Everything follows from the number of rows, so no module carries lengths around. Under sequence parallelism
each rank's shard is such a block, with the summaries of the chunks whose text it holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class RowLayout:
    """Numbers of text and summary rows for chunks of chunk_size text tokens with summary_tokens summaries each.

    `offset` is the number of tokens of the running chunk that came before the first row, 0 to chunk_size - 1: more than
    0 only in incremental decoding.
    """

    chunk_size: int
    summary_tokens: int
    offset: int = 0

    def chunks(self, text_rows: int) -> int:
        """Chunks that text_rows text rows complete."""
        return (self.offset + text_rows) // self.chunk_size

    def summary_rows(self, text_rows: int) -> int:
        """Summary rows of text_rows text rows; a ragged last chunk has none."""
        return self.chunks(text_rows) * self.summary_tokens

    def total_rows(self, text_rows: int) -> int:
        """Text and summary rows together."""
        return text_rows + self.summary_rows(text_rows)

    def text_rows(self, total_rows: int) -> int:
        """The inverse of `total_rows`.

        Raises:
            UsageError: a number of rows that no number of text rows has, such as the rows of shards that cut a chunk.
        """
        chunks, ragged = divmod(self.offset + total_rows, self.chunk_size + self.summary_tokens)
        text = chunks * self.chunk_size + ragged - self.offset
        if text < 0 or self.total_rows(text) != total_rows:
            raise UsageError(
                f"{total_rows} rows are no text rows with {self.summary_tokens} summary rows after each complete chunk "
                f"of {self.chunk_size}: each shard's text must be a multiple of the chunk size (--ksa-chunk-size)"
            )
        return text

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
        """Views of the text rows and of the summary rows of `rows` along `dim`.

        Raises:
            UsageError: as from `text_rows`.
        """
        text = self.text_rows(rows.shape[dim])
        # One split, not two slices, whose gradients would each be as large as the whole.
        return rows.split([text, rows.shape[dim] - text], dim)

    def grow(self, text: Tensor, summary_embedding: Tensor) -> Tensor:
        """Append the summary rows: [n, batch, hidden] and [S, hidden] -> [total_rows(n), batch, hidden]."""
        chunks = self.chunks(text.shape[0])
        summaries = summary_embedding.to(text.dtype).repeat(chunks, 1)[:, None].expand(-1, text.shape[1], -1)
        return torch.cat([text, summaries])

    def shrink(self, rows: Tensor) -> Tensor:
        """Drop the summary rows: the inverse of `grow`."""
        return self.split(rows)[0]


def document_starts(position_ids: Tensor) -> Tensor:
    """Position of the first token of each token's document.

    Args:
        position_ids: int [batch, n], counting from 0 in each document of a whole (not context-parallel) sequence.

    Returns:
        int32 [batch, n], nondecreasing along n.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return (index - position_ids).to(torch.int32)


def document_starts_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """Position of the first token of each token's document, for one packed sequence.

    Args:
        cu_seqlens: int [documents + 1], cumulative lengths from 0 to n.

    Returns:
        int32 [1, n].
    """
    starts = cu_seqlens[:-1].to(torch.int32)
    return torch.repeat_interleave(starts, cu_seqlens.diff().long())[None]


def summary_positions(layout: RowLayout, num_text: int, document_start: Tensor | None, device: torch.device) -> Tensor:
    """Sequence index whose rotary position each summary row takes (docs/ksa.md, "Positions").

    Summary (c, s) takes text token c*C + ((s+1)*C)//S - 1, but none before the chunk's first token nor, with documents,
    before the first token of the document that the chunk's last token belongs to.

    Args:
        num_text: n, text tokens of the whole sequence.
        document_start: int [batch, n] as from `document_starts`, or None.

    Returns:
        int64 [batch or 1, n // C * S], counted from the first text row.
    """
    chunk_size, summary_tokens = layout.chunk_size, layout.summary_tokens
    first = torch.arange(layout.chunks(num_text), device=device)[:, None] * chunk_size - layout.offset  # [chunks, 1]
    s = torch.arange(summary_tokens, device=device)
    index = torch.maximum(first + (s + 1) * chunk_size // summary_tokens - 1, first)[None]  # [1, chunks, S]
    if document_start is not None:
        last_token = first[:, 0] + chunk_size - 1
        index = torch.maximum(index, document_start[:, last_token, None].long())
    return index.flatten(1)


def row_positions(layout: RowLayout, num_text: int, document_start: Tensor | None, device: torch.device) -> Tensor:
    """Rotary positions of all rows of a whole sequence, laid out `[text | summaries]`.

    Positions restart at 0 with each document.

    Args:
        num_text: n, text tokens of the whole sequence.
        document_start: int [batch, n] as from `document_starts`, or None.

    Returns:
        int64 [rows, batch or 1].
    """
    text = torch.arange(num_text, device=device)[None]
    summaries = summary_positions(layout, num_text, document_start, device)
    index = torch.cat([text.expand(len(summaries), -1), summaries], dim=1)
    if document_start is None:
        return index.transpose(0, 1)
    return (index - document_start.long().gather(1, index)).transpose(0, 1)
