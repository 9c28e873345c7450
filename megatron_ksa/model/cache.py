"""What a layer keeps of a sequence while it is decoded: every row in a full layer, window and summaries in KSA's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_summary_attention, ksa_text_attention
from megatron_ksa.layout.rows import RowLayout


class KVCache:
    """Rotated keys and the values of one layer's rows, for incremental decoding.

    The buffers grow by doubling; rows that are no longer seen can be dropped, which makes room for new ones.

    Attributes:
        first: number of the oldest row that is kept.
        length: rows so far, dropped ones included.
    """

    def __init__(self) -> None:
        self.first = self.length = 0
        self._begin = 0  # place of row `first` in the buffers
        self._buffers: list[Tensor] = []

    def append(self, *rows: Tensor) -> list[Tensor]:
        """Keep new rows; return all rows kept, from `first` on.

        Args:
            rows: keys and values, [new rows, batch, K/V heads, head_dim] each.

        Returns:
            Views [rows, batch, K/V heads, head_dim] of each.
        """
        new, kept = rows[0].shape[0], self.length - self.first
        if not self._buffers or self._begin + kept + new > self._buffers[0].shape[0]:
            grown = [row.new_empty(2 * kept + new, *row.shape[1:]) for row in rows]
            for buffer, old in zip(grown, self._buffers, strict=bool(self._buffers)):
                buffer[:kept] = old[self._begin : self._begin + kept]
            self._begin, self._buffers = 0, grown
        end = self._begin + kept + new
        for buffer, row in zip(self._buffers, rows, strict=True):
            buffer[end - new : end] = row
        self.length += new
        return [buffer[self._begin : end] for buffer in self._buffers]

    def drop_before(self, row: int) -> None:
        """Forget the rows before number `row`."""
        dropped = max(row - self.first, 0)
        self.first, self._begin = self.first + dropped, self._begin + dropped

    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
        """Causal attention output of the newest rows, which are kept.

        Args:
            query: [new rows, batch, heads, head_dim]; key and value with K/V heads. Keys are rotated.

        Returns:
            [new rows, batch, heads * head_dim].
        """
        key, value = self.append(key, value)
        new, rows = query.shape[0], key.shape[0]
        # [batch, heads, rows, head_dim]
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        visible = None
        if 1 < new < rows:
            visible = torch.ones(new, rows, dtype=torch.bool, device=q.device).tril(rows - new)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=new == rows > 1, scale=softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).flatten(2)


class KSACache:
    """Keys and values of the text in the window and of every summary: S rows per C tokens are all that grows.

    KSA report (arXiv 2604.24432), decoding.
    """

    def __init__(self) -> None:
        self.text = KVCache()
        self.summaries = KVCache()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: RowLayout,
        geometry: KSAGeometry,
        softmax_scale: float | None,
    ) -> Tensor:
        """Attention output of the newest rows, which are kept.

        Text queries see the text of their window and the summaries of older chunks. The summaries of chunks that the
        new text completes read those chunks; text that no later token will see is then forgotten.

        Args:
            query: [rows, batch, heads, head_dim], new text rows, then summary rows of the chunks that they complete;
                key and value with K/V heads. Keys are rotated.
            layout: with the offset of the first text row in its chunk.

        Returns:
            [rows, batch, heads * head_dim].
        """
        chunk_size, start = geometry.chunk_size, self.text.length
        # [batch, rows, heads, head_dim] from here on.
        (queries, summary_queries), *new = (layout.split(rows) for rows in (query, key, value))
        text = [rows.transpose(0, 1) for rows in self.text.append(*(rows for rows, _ in new))]
        own = [rows for _, rows in new]
        summaries = [rows.transpose(0, 1) for rows in self.summaries.append(*own)]
        first = self.text.first
        out, _ = ksa_text_attention(
            queries.transpose(0, 1), *text, *summaries, geometry, query_start=start, key_start=first,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        chunk, end = start // chunk_size, self.text.length // chunk_size
        if end > chunk and layout.summary_tokens:
            completed = [rows[:, chunk * chunk_size - first : end * chunk_size - first] for rows in text]
            read = ksa_summary_attention(
                summary_queries.transpose(0, 1), *completed, *(rows.transpose(0, 1) for rows in own), geometry,
                key_start=chunk * chunk_size, softmax_scale=softmax_scale,
            )  # fmt: skip
            out = torch.cat([out, read], dim=1)
        self.text.drop_before((end - geometry.window_chunks) * chunk_size)
        return out.transpose(0, 1).flatten(2)
