"""Core attention of KSA, window and full layers: what each query sees, for rows [rows, batch, heads, head_dim].

All take Megatron's `attention_mask` argument as `document_start` (int32 [batch, n], see
`megatron_ksa.layout.rows.document_starts`) or None: the argument is the one tensor that Megatron hands through
pipeline stages and activation recompute to every layer, and text-by-text masks are never needed here.
"""

import dataclasses
from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ksa.context_parallel.attention import context_parallel_attention
from megatron_ksa.context_parallel.ulysses import all_to_all_attention
from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention, ksa_summary_attention, ksa_text_attention
from megatron_ksa.kernels.ksa_decode import CacheGeometry
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.layout.zigzag import ZigZag
from megatron_ksa.model.cache import LayerCache, window_geometry
from megatron_ksa.model.causal_attention import causal_attention

TEXT_ONLY = RowLayout(1, 0)


class _CoreAttention(MegatronModule):
    """What both kinds below share: Megatron's constructor, and attention over the ranks of a context-parallel group.

    Attributes:
        causal: the teacher's pass of distillation: rows are text, and a query sees all before it, whatever the window.
        cache: rows before those of a call, while sequences are decoded (`megatron_ksa.inference`); else None.

    Raises:
        UsageError: attention dropout above 0, which would have no effect.
    """

    causal = False
    cache: LayerCache | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise UsageError(f"this attention has no dropout, attention_dropout is {dropout}: use 0")
        self.softmax_scale = softmax_scale
        self.cp_comm_type = cp_comm_type
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.split = ZigZag(self.cp_group.rank(), self.cp_group.size()) if self.cp_group is not None else ZigZag()

    def cache_geometry(self, max_length: int) -> CacheGeometry:
        """Rows that the layer keeps of a sequence of at most max_length tokens while it is decoded."""
        return CacheGeometry(1, 0, max_length, 0)

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor, document_start: Tensor | None) -> Tensor:
        """Causal attention among text rows; arguments and result as in `KSACoreAttention.forward`."""
        # A window over everything, in chunks of one token.
        geometry = KSAGeometry(1, 1, query.shape[0] * self.split.size)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _text_attention(q, k, v, geometry, document_start, self.softmax_scale)

        return self._attend(whole, (query, key, value), TEXT_ONLY, geometry, document_start).flatten(2)

    def _attend(
        self,
        whole: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: tuple[Tensor, Tensor, Tensor],
        layout: RowLayout,
        geometry: KSAGeometry,
        document_start: Tensor | None,
    ) -> Tensor:
        """Attention of this rank's rows.

        Args:
            whole: attention of a whole sequence, which serves without context parallelism and between all-to-alls.
            rows: query, key and value, [rows, batch, heads, head_dim] each.
            layout: of the rows.
            geometry: which chunks a query sees, for the exchange between ranks.
            document_start: int32 [batch, n] of the whole sequence, or None.

        Returns:
            [rows, batch, heads, head_dim].
        """
        if self.cp_group is None:
            return whole(*rows)
        parallel = {"split": self.split, "group": self.cp_group}
        if self.cp_comm_type == "a2a":
            return all_to_all_attention(whole, *rows, layout=layout, **parallel)
        return context_parallel_attention(
            *rows, geometry, text_rows=layout.text_rows(rows[0].shape[0]), document_start=document_start,
            softmax_scale=self.softmax_scale, **parallel,
        )  # fmt: skip


def _text_attention(
    q: Tensor, k: Tensor, v: Tensor, geometry: KSAGeometry, document_start: Tensor | None, softmax_scale: float | None
) -> Tensor:
    """Attention among the text rows of a whole sequence, within the window of `geometry` and within documents.

    Args:
        q, k, v: [n, batch, heads, head_dim], K/V heads for k and v.

    Returns:
        [n, batch, heads, head_dim].
    """
    if document_start is None and geometry.window_chunks * geometry.chunk_size >= q.shape[0]:
        return causal_attention(q, k, v, softmax_scale)
    q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))
    none = k[:, :0]
    out, _ = ksa_text_attention(
        q, k, v, none, none, geometry, document_start=document_start, softmax_scale=softmax_scale
    )
    return out.transpose(0, 1)


class KSACoreAttention(_CoreAttention):
    """KSA among rows laid out `[text | summaries]` (KSA report, arXiv 2604.24432, visibility rules).

    Args:
        window_chunks: W, past chunks that a text query sees as text.
        sees_all_text: the window is over the whole sequence, also one that is longer than `window_chunks` says.

    Attributes:
        shares: where a list, each pass appends the share of attention that text queries give to summaries, float32 [].
    """

    shares: list[Tensor] | None = None

    def __init__(self, *args, layout: RowLayout, window_chunks: int, sees_all_text: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.layout, self.sees_all_text = layout, sees_all_text
        self.geometry = KSAGeometry(layout.chunk_size, layout.summary_tokens, window_chunks)

    def cache_geometry(self, max_length: int) -> CacheGeometry:
        window = max_length if self.sees_all_text else self.geometry.window_chunks
        return window_geometry(self.layout, window, max_length)

    def _geometry(self, text_length: int) -> KSAGeometry:
        """The geometry for a whole sequence of text_length tokens."""
        chunks = -(-text_length // self.geometry.chunk_size)
        if not self.sees_all_text or chunks <= self.geometry.window_chunks:
            return self.geometry
        return dataclasses.replace(self.geometry, window_chunks=chunks)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention output of all rows of this context-parallel rank.

        Args:
            query: [rows, batch, heads, head_dim], text rows then summary rows; key and value with K/V heads.
            attention_mask: `document_start`, int32 [batch, n] of the whole sequence, or None.

        Returns:
            [rows, batch, heads * head_dim]. With sequence parallelism rows are in the order of the ranks' shards, each
            laid out `[text | summaries]`, so that the output projection's reduce-scatter gives each rank its shard.
        """
        if self.cache is not None:
            return self.cache.attend(query, key, value, self.layout, self.softmax_scale)
        if self.causal:
            return self._attend_causally(query, key, value, attention_mask)

        geometry = self._geometry(self.layout.text_rows(query.shape[0]) * self.split.size)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            text_rows = self.layout.text_rows(q.shape[0])
            if attention_mask is None and geometry.window_chunks * geometry.chunk_size >= text_rows:
                return self._large_window(q, k, v)
            return ksa_attention(
                *(rows.transpose(0, 1) for rows in (q, k, v)),
                geometry,
                text_rows=text_rows,
                document_start=attention_mask,
                softmax_scale=self.softmax_scale,
            ).transpose(0, 1)

        if self.shares is not None:
            # With values of 1 for summaries and 0 for text, attention's output is the share.
            ones = torch.cat([part.fill_(of) for of, part in enumerate(self.layout.split(torch.empty_like(value)))])
            with torch.no_grad():
                share = self._attend(whole, (query, key, ones), self.layout, geometry, attention_mask)
            self.shares.append(self.layout.split(share)[0].float().mean())
        out = self._attend(whole, (query, key, value), self.layout, geometry, attention_mask).flatten(2)
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        if shards == 1:
            return out
        by_shard = [part.unflatten(0, (shards, -1)) for part in self.layout.split(out)]
        return torch.cat(by_shard, dim=1).flatten(0, 1)

    def _large_window(self, *rows: Tensor) -> Tensor:
        """Attention of a window over the whole sequence: no text query sees a summary, so causal attention serves.

        Args:
            rows: query, key and value, [rows, batch, heads, head_dim].
        """
        (q_text, q_summary), (k_text, k_summary), (v_text, v_summary) = (self.layout.split(part) for part in rows)
        text = causal_attention(q_text, k_text, v_text, self.softmax_scale)
        whole = q_text.shape[0] // self.layout.chunk_size * self.layout.chunk_size
        chunks = (part.transpose(0, 1) for part in (q_summary, k_text[:whole], v_text[:whole], k_summary, v_summary))
        summaries = ksa_summary_attention(*chunks, self.geometry, softmax_scale=self.softmax_scale)
        return torch.cat([text, summaries.transpose(0, 1)])


class TextCoreAttention(_CoreAttention):
    """Attention among text rows, within documents where they are given: full layers, and windows without summaries.

    Args:
        window_chunks: past chunks of `chunk_size` tokens that a query sees beside its own, what KSA is measured
            against; None is causal attention to all rows before.
    """

    def __init__(self, *args, chunk_size: int = 1, window_chunks: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = None if window_chunks is None else KSAGeometry(chunk_size, 1, window_chunks)

    def cache_geometry(self, max_length: int) -> CacheGeometry:
        if self.geometry is None:
            return super().cache_geometry(max_length)
        return window_geometry(RowLayout(self.geometry.chunk_size, 0), self.geometry.window_chunks, max_length)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention output [text rows, batch, heads * head_dim]; arguments as in `KSACoreAttention.forward`."""
        if self.cache is not None:
            return self.cache.attend(query, key, value, TEXT_ONLY, self.softmax_scale)
        if self.causal or self.geometry is None:
            return self._attend_causally(query, key, value, attention_mask)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _text_attention(q, k, v, self.geometry, attention_mask, self.softmax_scale)

        return self._attend(whole, (query, key, value), TEXT_ONLY, self.geometry, attention_mask).flatten(2)
