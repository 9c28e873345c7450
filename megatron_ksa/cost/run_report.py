"""A run's costs from Megatron's arguments: its model's shape, its layout, and the report at start."""

import argparse

import torch

from megatron_ksa.config.recompute import Recompute
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.memory import report as memory_report
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.cost.traffic import HeadShape
from megatron_ksa.cost.traffic import report as traffic_report


def training_layout(args: argparse.Namespace, settings: RunSettings) -> TrainingLayout | None:
    """The layout of a run after Megatron's validation; None for models that the formulas do not describe (MoE)."""
    if args.num_experts is not None:
        return None
    sixteen_bits = args.bf16 or args.fp16
    on_gpu = torch.cuda.is_available()
    kernels = on_gpu and not settings.kernels.reference
    comm = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
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
        recompute=Recompute.from_args(args),
        context_comm=tuple(kind or "p2p" for kind in comm),
        loss=settings.loss,
        train=settings.train,
        distills=settings.distill.enabled,
        compares_attention=settings.distill.compares_attention,
        teacher_on_host=settings.distill.offload,
        # torch's LayerNorm is one kernel on a CPU too.
        fused_norm=on_gpu or args.normalization == "LayerNorm",
        fused_swiglu=args.bias_swiglu_fusion,
        fused_attention=kernels,
        fused_rotation=kernels,
        fused_gradient=args.gradient_accumulation_fusion,
        resets_documents=args.reset_position_ids,
    )


def model_shape(args: argparse.Namespace, settings: RunSettings) -> ModelShape:
    """The shape of a model, for trainer and planner.

    Args:
        args: Megatron's arguments with sizes resolved (kv_channels, ffn_hidden_size, padded_vocab_size).
    """
    return ModelShape(
        ksa=settings.ksa,
        num_layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocabulary=args.padded_vocab_size,
        gated=args.swiglu or args.quick_geglu,
        tied=not args.untie_embeddings_and_output_weights,
        qk_norm=args.qk_layernorm,
        bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        norm_vectors=1 if args.normalization == "RMSNorm" else 2,
        angles_per_head=settings.bases is not None,
    )


def run_report(args: argparse.Namespace, settings: RunSettings) -> str:
    """What a run is expected to cost, printed at start: bytes of context parallelism, memory of the fullest stage.

    Args:
        args: Megatron's arguments after its validation.

    Returns:
        Lines of text; empty where there is nothing to say (experts on one context-parallel rank).
    """
    shape, parts = model_shape(args, settings), []
    if args.context_parallel_size > 1:
        tp = args.tensor_model_parallel_size
        element_bytes = 2 if args.bf16 or args.fp16 else 4
        heads = HeadShape(shape.heads // tp, max(shape.kv_heads // tp, 1), shape.head_dim, element_bytes)
        comm = args.cp_comm_type if len(args.cp_comm_type) > 1 else args.cp_comm_type[0]
        sizes = shape.num_layers, args.seq_length, args.context_parallel_size
        parts.append(traffic_report(settings.ksa, *sizes, comm, heads))
    layout = training_layout(args, settings)
    # What is recomputed to fit is chosen, and said, when the GPUs of all ranks are known.
    if layout is not None and settings.fit.margin is None:
        parts.append(memory_report(shape, layout))
    return "\n".join(parts)
