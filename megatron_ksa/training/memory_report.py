"""The memory report of a run: its model's shape and its layout from Megatron's arguments and configuration."""

import argparse
from typing import TYPE_CHECKING

import torch

from megatron_ksa.config.loss import LossConfig
from megatron_ksa.training.memory import ModelShape, TrainingLayout

if TYPE_CHECKING:
    from megatron_ksa.model.builder import KSAGPTModelConfig


def training_layout(args: argparse.Namespace, loss: LossConfig) -> TrainingLayout | None:
    """The layout of a run after Megatron's validation; None for models that the formulas do not describe (MoE)."""
    if args.num_experts is not None:
        return None
    sixteen_bits = args.bf16 or args.fp16
    on_gpu = torch.cuda.is_available()
    return TrainingLayout(
        text_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        num_micro_batches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        tensor_parallel=args.tensor_model_parallel_size,
        context_parallel=args.context_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        data_parallel=args.data_parallel_size,
        virtual_stages=args.virtual_pipeline_model_parallel_size or 1,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        parameter_bytes=2 if sixteen_bits else 4,
        gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 or not sixteen_bits else 2,
        recompute=args.recompute_granularity or "none",
        recompute_layers=args.recompute_num_layers or 1,
        loss=loss,
        fused_norm=on_gpu,
        fused_swiglu=args.bias_swiglu_fusion,
        fused_attention=on_gpu,
        fused_gradient=args.gradient_accumulation_fusion,
    )


def model_shape(config: "KSAGPTModelConfig", vocabulary: int) -> ModelShape:
    """The shape of a model; `vocabulary` is padded."""
    transformer = config.transformer
    return ModelShape(
        ksa=config.ksa,
        num_layers=transformer.num_layers,
        hidden=transformer.hidden_size,
        ffn=transformer.ffn_hidden_size,
        heads=transformer.num_attention_heads,
        kv_heads=transformer.num_query_groups or transformer.num_attention_heads,
        head_dim=transformer.kv_channels,
        vocabulary=vocabulary,
        gated=transformer.gated_linear_unit,
        tied=config.share_embeddings_and_output_weights,
        qk_norm=transformer.qk_layernorm,
        bias=transformer.add_bias_linear,
        qkv_bias=transformer.add_qkv_bias,
        norm_vectors=1 if transformer.normalization == "RMSNorm" else 2,
        angles_per_head=config.bases is not None,
    )
