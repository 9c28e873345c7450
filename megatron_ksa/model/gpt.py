"""GPT with summary rows and explicit rotary positions, on Megatron's GPTModel."""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.dispatch import uses_triton
from megatron_ksa.kernels.rotation import OP as ROTATION
from megatron_ksa.layout.rows import document_starts, document_starts_from_cu_seqlens, row_positions
from megatron_ksa.layout.zigzag import ZigZag
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.core_attention import KSACoreAttention
from megatron_ksa.model.distillation import Distillation
from megatron_ksa.model.layer_specs import ksa_block_spec
from megatron_ksa.model.layers import SummaryEmbedding
from megatron_ksa.model.low_precision import check_rows_in_fp8
from megatron_ksa.model.prepare import FIELDS, check_settings, check_shards, set_required
from megatron_ksa.model.rotated_attention import RotatedSelfAttention
from megatron_ksa.rotary.embedding import PositionedRotaryEmbedding


class KSAGPTModel(GPTModel):
    """Megatron's GPTModel whose decoder sees `[text | summaries]` rows; loss and logits have the text length.

    Summary rows are appended on the first pipeline stage, after the embedding, and dropped on the last one before the
    output layer. Rotary angles are made from explicit positions on every stage.

    Args:
        config: Megatron's, as `prepare_config` returns it; what that function sets is set here again.
        ksa: KSA settings; with `enabled` off every layer is full attention and there are no summary rows.
        seq_length: n, text tokens in a training sequence, which decides the window of large-window layers. The model
            takes sequences of other lengths too.
        vocab_size: rows of the embedding, padded for tensor parallelism.
        bases: rotary base of each KV group (HARPE), or None for the single `rotary_base`.
        max_sequence_length: GPTModel's; seq_length where it is None.
        position_embedding_type: rope, harpe (the same with `bases`) or none.
        reset_documents: position_ids restart with each document, and documents do not see each other.
        vp_stage: virtual pipeline stage, or None.
        Everything else is GPTModel's, with its defaults: pre_process, post_process, pg_collection, parallel_output,
            share_embeddings_and_output_weights, scatter_embedding_sequence_parallel, fp16_lm_cross_entropy, and the
            rotary settings.

    Raises:
        UsageError: a setting that KSA or HARPE does not go with, or a pattern that does not fit the number of layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ksa: KSAConfig,
        seq_length: int,
        *,
        vocab_size: int,
        bases: tuple[float, ...] | None = None,
        max_sequence_length: int | None = None,
        position_embedding_type: str = "rope",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        seq_len_interpolation_factor: float | None = None,
        reset_documents: bool = False,
        vp_stage: int | None = None,
        **kwargs,
    ) -> None:
        check_settings(
            config, ksa, FIELDS, bases=bases, position_embedding_type=position_embedding_type, rope_scaling=rope_scaling
        )
        set_required(config, ksa)
        # 'none' keeps GPTModel from building angles for positions 0 to s - 1; they are made below instead.
        super().__init__(
            config,
            ksa_block_spec(config, ksa, seq_length, vp_stage),
            vocab_size,
            max_sequence_length or seq_length,
            position_embedding_type="none",
            vp_stage=vp_stage,
            **kwargs,
        )
        self.ksa = ksa
        self.layout = ksa.rows
        cp_group = self.pg_collection.cp
        self.split = ZigZag(cp_group.rank(), cp_group.size())
        self.reset_documents = reset_documents
        # While a checkpoint is read: what it has for the tensors that this model asks for.
        self.asked_of_checkpoint: Callable[[ShardedStateDict], ShardedStateDict] | None = None
        # Position of the first row given, one or int64 [batch]: more than 0 only in incremental decoding.
        self.position_offset: int | Tensor = 0
        self.distillation: Distillation | None = None
        # The annealing coefficient that CUDA graphs read, float32 [], once it was set.
        self.graphs_coefficient: Tensor | None = None
        # int32 [batch, n] during a forward pass, see `_document_start`.
        self._document_start: Tensor | None = None
        if self.pre_process and self.layout.summary_tokens:
            self.summary_embedding = SummaryEmbedding(self.config, self.layout)
        self.rotary = None
        if position_embedding_type != "none":
            self.rotary = PositionedRotaryEmbedding.build(
                self.config,
                bases=bases or (rotary_base,),
                rotary_percent=rotary_percent,
                seq_len_interpolation_factor=seq_len_interpolation_factor,
                tp_group=self.pg_collection.tp,
            )
            if rope_scaling:
                self.rotary.rescale(
                    lambda freqs: RotaryEmbedding._apply_scaling(self.rotary, freqs, factor=rope_scaling_factor)
                )
            for module in self.decoder.modules():
                if isinstance(module, RotatedSelfAttention):
                    module.set_rotary(self.rotary)

    def measure_attention_share(self, measures: bool) -> None:
        """Let every KSA layer of kind k append its share of attention on summaries to `shares`, or stop it."""
        for core in self.summary_cores():
            core.shares = [] if measures else None

    def summary_cores(self) -> list[KSACoreAttention]:
        """Core attention of the layers whose text sees summaries."""
        modules = self.decoder.modules()
        return [module for module in modules if isinstance(module, KSACoreAttention) and not module.sees_all_text]

    def distill(self, config: DistillConfig, num_ksa_layers: int) -> None:
        """Make the model its own teacher: its output processor is to be a `DistillationLoss`.

        Args:
            num_ksa_layers: of the whole model, all pipeline stages together.
        """
        self.distillation = Distillation(self.decoder, self.layout, config, num_ksa_layers)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """GPTModel's, {name: sharded tensor}; while a checkpoint of another kind is read, under that one's keys."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state if self.asked_of_checkpoint is None else self.asked_of_checkpoint(state)

    def set_summary_coefficient(self, a: float) -> None:
        """Set the weight of the summary projections on summary rows in every layer (annealing).

        With CUDA graphs and annealing, graphs read it from the device: set it between iterations, not while one is
        captured.
        """
        value: float | Tensor = a
        if self.config.cuda_graph_impl != "none" and self.ksa.anneal_start is not None:
            if self.graphs_coefficient is None:
                device = next(self.parameters()).device
                self.graphs_coefficient = torch.empty((), dtype=torch.float32, device=device)
            value = self.graphs_coefficient.fill_(a)
        for module in self.decoder.modules():
            if isinstance(module, KSASelfAttention):
                module.summary_coefficient = value

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *args,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ) -> Tensor:
        """GPTModel's forward: loss [batch, n] with labels, else logits [batch, n, vocabulary].

        `attention_mask` is ignored: the core attention decides visibility. With `reset_documents`, position_ids
        (int [batch, n], needed on every pipeline stage) or, in any case, packed_seq_params.cu_seqlens_q (or its padded
        twin; batch 1) tell where documents start. Under context parallelism all of them but cu_seqlens_q are this
        rank's zig-zag part, [batch, n / cp].

        Raises:
            UsageError: rows that are no shards of whole chunks, or documents of another length than the sequence.
        """
        # Once a forward pass: under context parallelism it costs an all-gather.
        self._document_start = self._find_documents(position_ids, packed_seq_params)
        try:
            return super().forward(input_ids, position_ids, self._document_start, *args, **kwargs)
        finally:
            self._document_start = None

    def _find_documents(self, position_ids: Tensor | None, packed: PackedSeqParams | None) -> Tensor | None:
        """Position of the first token of each token's document, int32 [batch, n] of whole sequences, or None."""
        if packed is not None:
            # Padding between sequences, where there is some, belongs to the document before it.
            padded = packed.cu_seqlens_q_padded
            return document_starts_from_cu_seqlens(packed.cu_seqlens_q if padded is None else padded)
        if not self.reset_documents:
            return None
        if self.split.size > 1:
            own = position_ids.to(torch.int32).contiguous()
            parts = [torch.empty_like(own) for _ in range(self.split.size)]
            torch.distributed.all_gather(parts, own, group=self.pg_collection.cp)
            position_ids = self.split.restore(torch.cat(parts, dim=1), dim=1)
        return document_starts(position_ids)

    def _text_length(self, rows: Tensor) -> int:
        """n, text tokens of the whole sequence of which `rows` [rows, batch, hidden] are this rank's shard."""
        shards = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        length = self.layout.text_rows(rows.shape[0]) * shards * self.split.size
        if shards * self.split.size > 1:
            check_shards(self.config, self.ksa, length)
        if self.config.fp8:
            check_rows_in_fp8(self.ksa, length, rows.shape[1], shards * self.split.size, "a length of")
        documents = self._document_start
        if documents is not None and documents.shape != (rows.shape[1], length):
            raise UsageError(
                f"documents are told for {documents.shape[0]} x {documents.shape[1]} tokens (batch x length), the "
                f"model was given {rows.shape[1]} x {length}"
            )
        return length

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple:
        """GPTModel's: embedded rows, then what `RotatedSelfAttention` takes as rotary_pos_emb.

        That is a pair of angles, or, where the rotation kernel runs, int64 positions [rows, batch or 1].
        """
        decoder_input, _, *rest = super()._preprocess(
            input_ids, position_ids, decoder_input, inference_context, packed_seq_params, padding_mask
        )
        if self.pre_process and self.layout.summary_tokens:
            text, decoder_input = decoder_input, self.summary_embedding(decoder_input)
            if self.distillation is not None:
                decoder_input = torch.cat([decoder_input, text])
        rows = decoder_input if self.pre_process else self.decoder.input_tensor
        if self.distillation is not None:
            rows, _ = self.distillation.split(rows)
        num_text = self._text_length(rows)
        angles = None
        if self.rotary is not None:
            positions = row_positions(self.layout, num_text, self._document_start, rows.device)
            positions = torch.cat([self.split.take(part) for part in self.layout.split(positions)])
            positions = positions + self.position_offset
            angles = positions if uses_triton(ROTATION, rows) else self.rotary(positions)
        return decoder_input, angles, *rest

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """GPTModel's, on the text rows; a teacher's are the output processor's context."""
        if self.post_process:
            if self.distillation is not None:
                hidden_states, kwargs["output_processor_context"] = self.distillation.split(hidden_states)
            hidden_states = self.layout.shrink(hidden_states)
        return super()._postprocess(hidden_states, *args, **kwargs)
