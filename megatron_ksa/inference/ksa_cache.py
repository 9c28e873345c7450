"""What a KSA layer keeps of a sequence while it is decoded (KSA report, arXiv 2604.24432)."""

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_summary_attention, ksa_text_attention
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.core_attention import KVCache


class KSACache:
    """Keys and values of the text in the window and of every summary: S rows per C tokens are all that grows."""

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
        if end > chunk:
            completed = [rows[:, chunk * chunk_size - first : end * chunk_size - first] for rows in text]
            read = ksa_summary_attention(
                summary_queries.transpose(0, 1), *completed, *(rows.transpose(0, 1) for rows in own), geometry,
                key_start=chunk * chunk_size, softmax_scale=softmax_scale,
            )  # fmt: skip
            out = torch.cat([out, read], dim=1)
        self.text.drop_before((end - geometry.window_chunks) * chunk_size)
        return out.transpose(0, 1).flatten(2)
