"""What a layer keeps of the sequences that are decoded, allocated once: text in a ring, summaries behind it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_summary_attention, ksa_text_attention
from megatron_ksa.kernels.ksa_decode import CacheGeometry, decode_attention
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.causal_attention import causal_attention


@dataclass(frozen=True)
class Segment:
    """A step of one sequence: the next tokens of a prompt.

    Attributes:
        slot: the sequence's place in the cache.
        start: tokens that it had before.
    """

    slot: int
    start: int


@dataclass(frozen=True)
class NextTokens:
    """A step of many sequences: the next token of each.

    Attributes:
        slots: int64 [batch], the sequences' places in the cache.
        starts: int64 [batch], tokens that each of them had before.
    """

    slots: Tensor
    starts: Tensor


def window_geometry(layout: RowLayout, window_chunks: int, max_length: int) -> CacheGeometry:
    """Rows of a layer whose text queries see W past chunks as text, and older ones as summaries if there are."""
    chunk_size = layout.chunk_size
    ring = (window_chunks + 1) * chunk_size
    if ring >= max_length:
        # No query sees a summary.
        return CacheGeometry(chunk_size, 0, -(-max_length // chunk_size) * chunk_size, 0)
    return CacheGeometry(chunk_size, layout.summary_tokens, ring, layout.summary_rows(max_length))


class LayerCache:
    """Rotated keys and the values of one layer's rows, of many sequences.

    KSA report (arXiv 2604.24432), decoding: the text of the window and every summary, S rows for C tokens.

    Args:
        geometry: rows of each sequence.
        max_length: tokens of the longest sequence.
        slots: sequences at a time.
        groups: K/V heads.

    Attributes:
        key, value: [slots, K/V heads, rows, head_dim].
        place: which rows the next call of `attend` brings.
    """

    place: Segment | NextTokens

    def __init__(
        self, geometry: CacheGeometry, max_length: int, slots: int, groups: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.geometry = geometry
        self.is_causal = geometry.ring >= max_length
        shape = (slots, groups, geometry.rows, head_dim)
        self.key, self.value = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, softmax_scale: float | None
    ) -> Tensor:
        """Attention output of the newest rows, which are kept.

        Args:
            query: [rows, batch, heads, head_dim]; key and value with K/V heads. Keys are rotated. For a segment, its
                text rows and the summary rows of the chunks that they complete; for next tokens, see
                `kernels.ksa_decode.reference`.
            layout: with the offset of the segment's first row in its chunk.

        Returns:
            [rows, batch, heads * head_dim].
        """
        if isinstance(self.place, NextTokens):
            out = decode_attention(
                query, key, value, self.key, self.value, self.place.slots, self.place.starts, self.geometry,
                softmax_scale=softmax_scale,
            )  # fmt: skip
            return out.flatten(2)
        return self._attend_segment(query, key, value, layout, self.place, softmax_scale)

    def _attend_segment(
        self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, place: Segment, softmax_scale: float | None
    ) -> Tensor:
        (q, q_summary), *rows = (layout.split(part) for part in (query, key, value))
        new, summaries = zip(*rows, strict=True)
        start, end = place.start, place.start + q.shape[0]
        chunk, chunks = start // layout.chunk_size, end // layout.chunk_size
        buffers = (self.key[place.slot], self.value[place.slot])
        if self.geometry.summaries:
            # Before text attends, which sees those of this segment's older chunks too.
            at = slice(*(self.geometry.ring + layout.summary_tokens * c for c in (chunk, chunks)))
            for buffer, part in zip(buffers, summaries, strict=True):
                buffer[:, at] = part[:, 0].transpose(0, 1)
        oldest = self._oldest(start, end)
        text = [self._extend(buffer, part, oldest, start) for buffer, part in zip(buffers, new, strict=True)]
        out = self._attend_text(q, text, buffers, oldest, start, chunks * layout.summary_tokens, softmax_scale)
        if not q_summary.shape[0]:
            return out.flatten(2)
        completed = slice(chunk * layout.chunk_size - oldest, chunks * layout.chunk_size - oldest)
        read = ksa_summary_attention(
            q_summary.transpose(0, 1), *(part[:, completed] for part in text),
            *(part.transpose(0, 1) for part in summaries),
            KSAGeometry(layout.chunk_size, layout.summary_tokens, 0), softmax_scale=softmax_scale,
        )  # fmt: skip
        return torch.cat([out, read.transpose(0, 1)]).flatten(2)

    def _oldest(self, start: int, end: int) -> int:
        """Position of the oldest text row that the queries at positions start to end - 1 see, of those in the ring."""
        if end <= self.geometry.ring:
            return 0
        chunk_size = self.geometry.chunk_size
        return max(start // chunk_size - self.geometry.window_chunks, 0) * chunk_size

    def _extend(self, buffer: Tensor, new: Tensor, oldest: int, start: int) -> Tensor:
        """Keep the text rows from position `start` on; return them behind the older ones from `oldest` on.

        Args:
            buffer: [K/V heads, rows, head_dim].
            new: [new rows, 1, K/V heads, head_dim].

        Returns:
            [1, rows, K/V heads, head_dim]: a view of the buffer unless the ring has turned.
        """
        ring, new = self.geometry.ring, new.transpose(0, 1)
        end = start + new.shape[1]
        by_position = buffer.transpose(0, 1)[None]
        if end <= ring:
            by_position[:, start:end] = new
            return by_position[:, :end]
        first, count = oldest % ring, start - oldest
        before_turn = min(count, ring - first)
        text = torch.cat([by_position[:, first : first + before_turn], by_position[:, : count - before_turn], new], 1)
        kept = new[:, -ring:]
        first = (end - kept.shape[1]) % ring
        before_turn = min(kept.shape[1], ring - first)
        by_position[:, first : first + before_turn] = kept[:, :before_turn]
        by_position[:, : kept.shape[1] - before_turn] = kept[:, before_turn:]
        return text

    def _attend_text(
        self, q: Tensor, text: list[Tensor], buffers: tuple[Tensor, Tensor], oldest: int, start: int, summaries: int,
        softmax_scale: float | None,
    ) -> Tensor:  # fmt: skip
        """[text rows, 1, heads, head_dim] of the queries from position `start` on, over what `_extend` returned."""
        key, value = text
        if self.is_causal and not start:
            return causal_attention(q, key.transpose(0, 1), value.transpose(0, 1), softmax_scale)
        if self.is_causal:
            # Any window over the whole sequence does; kernels look up tiles for each.
            geometry, older = KSAGeometry(1, 1, self.geometry.ring), [part[:, :0] for part in text]
        else:
            ring, kept = self.geometry.ring, summaries if self.geometry.summaries else 0
            geometry = KSAGeometry(
                self.geometry.chunk_size, max(self.geometry.summary_tokens, 1), self.geometry.window_chunks
            )
            older = [buffer[:, ring : ring + kept].transpose(0, 1)[None] for buffer in buffers]
        out, _ = ksa_text_attention(
            q.transpose(0, 1), key, value, *older, geometry, query_start=start, key_start=oldest,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        return out.transpose(0, 1)
