"""Megatron's command line with this project's flags, and the checks that need both."""

import argparse
import dataclasses

from megatron_ksa.checkpoint.async_save import adapt_async_save, async_save_defaults, check_async_save
from megatron_ksa.config.data import DataConfig
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.config.kernels import KernelConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.options import add_config_arguments, config_from_args
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.config.stage import StageConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.training.given import given_flags, record_given
from megatron_ksa.training.layout_rules import REQUIRED, check_layout, check_sizes
from megatron_ksa.training.stages import check_stage
from megatron_ksa.upstream import command_line
from megatron_ksa.upstream.patches import Applied, apply

ROTARY_TYPES = ("rope", "harpe")
CP_COMM_TYPES = ("p2p", "a2a")
# Those that train to the same numbers as without (tests/training/gpu_check.py).
CUDA_GRAPHS = ("none", "full_iteration", "local")


def install_arguments(defaults: dict[str, object]) -> Applied:
    """Make every parse of Megatron's command line know this project's flags.

    Args:
        defaults: argument destination -> default, where the machine wants another one than Megatron's.

    Returns:
        What undoes it; a context manager.
    """

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_config_arguments(parser, KSAConfig, "ksa", "KSA")
        add_config_arguments(parser, StageConfig, "ksa", "KSA stages")
        add_config_arguments(parser, DistillConfig, "ksa-distill", "KSA distillation")
        add_config_arguments(parser, HarpeConfig, "harpe", "HARPE")
        add_config_arguments(parser, DataConfig, "data", "training data")
        add_config_arguments(parser, KernelConfig, "kernels", "kernels")
        add_config_arguments(parser, LossConfig, "loss", "loss")
        for action in parser._actions:
            if action.dest == "position_embedding_type":
                action.choices = [*action.choices, "harpe"]
        parser.set_defaults(**defaults)
        record_given(parser)
        return parser

    return apply(command_line.patches(extend))


def resolve_defaults(args: argparse.Namespace) -> None:
    """Set what was not given by hand and depends on other flags; a second call changes nothing."""
    defaults: dict[str, object] = {}
    if args.ksa or args.position_embedding_type == "harpe":
        # Attention dropout is not part of this project's attention, so Megatron's default of 0.1 cannot hold.
        defaults["attention_dropout"] = 0.0
    if args.async_save:
        defaults |= async_save_defaults()
    for name, value in defaults.items():
        if name not in given_flags(args):
            setattr(args, name, value)


def settings_from_args(args: argparse.Namespace) -> RunSettings:
    """Resolve and check the flags and return this project's settings.

    Raises:
        UsageError: flags that contradict each other or a length that does not fit.
    """
    resolve_defaults(args)
    check_sizes(args)
    check_async_save(args)
    ksa = config_from_args(KSAConfig, args, "ksa")
    harpe = config_from_args(HarpeConfig, args, "harpe")
    bases = None
    if args.position_embedding_type == "harpe":
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        bases = harpe.resolve(groups)
    settings = RunSettings(
        ksa,
        bases,
        harpe.override_checkpoint,
        _loss_config(args),
        config_from_args(DataConfig, args, "data"),
        config_from_args(KernelConfig, args, "kernels"),
        config_from_args(DistillConfig, args, "ksa-distill"),
        config_from_args(StageConfig, args, "ksa"),
    )
    check_stage(args, settings)
    if not settings.is_megatron:
        _check(args, settings)
    return settings


def _loss_config(args: argparse.Namespace) -> LossConfig:
    """The loss's settings; Megatron's schemes that take the output layer apart keep the logits whole."""
    loss = config_from_args(LossConfig, args, "loss")
    tp = args.tensor_model_parallel_size
    whole_logits = {
        "--defer-embedding-wgrad-compute": args.defer_embedding_wgrad_compute,
        "--logits-save-dir": args.logits_save_dir is not None,
        "--logits-load-dir": args.logits_load_dir is not None,
        "--tensor-parallel-num-weight-shards": (args.tensor_parallel_num_weight_shards or tp) > tp,
    }
    for flag in (flag for flag, active in whole_logits.items() if active):
        if loss.chunk_rows:
            raise UsageError(f"--loss-chunk-rows does not go with {flag}: drop one of them")
        loss = LossConfig(chunk_rows=0)
    return loss


def _check(args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse what KSA and HARPE cannot work with."""
    feature = "--ksa" if settings.ksa.enabled else "--position-embedding-type harpe"
    for name in (name for name in REQUIRED if getattr(args, name) is None):
        raise UsageError(f"{feature} needs --{name.replace('_', '-')}")
    refused = [
        (args.multi_latent_attention, "--multi-latent-attention", "it has no K/V heads to share; drop it"),
        (args.use_rope_scaling and settings.bases, "--use-rope-scaling", "HARPE's bases take its place; drop it"),
        (args.mtp_num_layers, "--mtp-num-layers", "multi-token prediction layers are not supported; drop it"),
        (args.attention_output_gate, "--attention-output-gate", "gated attention is not supported; drop it"),
        (args.attention_dropout, f"--attention-dropout {args.attention_dropout}", "use --attention-dropout 0"),
        (args.sft, "--sft", "the batch reader serves pretraining data; drop it"),
        (args.spec, "--spec", "the layer specs are this project's own; drop it"),
        (args.flash_decode, "--flash-decode", "it assumes one frequency row for all heads; drop it"),
        (args.fp8, "--fp8-format", "its attention and summary projections are not checked in FP8; use --bf16"),
        (args.fp4, "--fp4-format", "its attention and summary projections are not checked in FP4; use --bf16"),
        (args.external_cuda_graph or args.cuda_graph_impl == "transformer_engine", "CUDA graphs of Transformer Engine",
         "it captures its own layers, and attention here is this project's; drop the flag"),
        (args.cuda_graph_impl not in CUDA_GRAPHS, f"--cuda-graph-impl {args.cuda_graph_impl}",
         f"use {', '.join(CUDA_GRAPHS)}"),
        (args.num_experts is None and args.qk_l2_norm, "--qk-l2-norm", "use --qk-layernorm"),
    ]
    for active, flag, way_out in refused:
        if active:
            raise UsageError(f"{feature} does not go with {flag}: {way_out}")
    if args.reset_position_ids != args.reset_attention_mask:
        missing = "--reset-attention-mask" if args.reset_position_ids else "--reset-position-ids"
        raise UsageError(f"{feature} resets documents with both flags or neither: {missing} is missing")
    if args.context_parallel_size > 1:
        _check_context_parallel(args, feature)
    if args.enable_cuda_graph or args.cuda_graph_impl != "none":
        _check_cuda_graphs(args, settings)
    if settings.ksa.enabled:
        if args.position_embedding_type not in (*ROTARY_TYPES, "none"):
            raise UsageError(
                f"--ksa needs explicit rotary positions, --position-embedding-type is {args.position_embedding_type}: "
                f"use rope, harpe or none"
            )
        settings.ksa.layers(args.num_layers, args.seq_length)
    rows = settings.ksa if settings.ksa.enabled else dataclasses.replace(settings.ksa, chunk_size=1)
    rows.check_sequence(
        args.seq_length,
        context_parallel=args.context_parallel_size,
        sequence_parallel=args.tensor_model_parallel_size if args.sequence_parallel else 1,
    )
    check_layout(args)


def _check_cuda_graphs(args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse what a CUDA graph would freeze, or what was never captured."""
    graphs = "--enable-cuda-graph" if args.enable_cuda_graph else f"--cuda-graph-impl {args.cuda_graph_impl}"
    if args.cuda_graph_impl == "full_iteration" and args.check_for_nan_in_loss_and_grad:
        raise UsageError(f"{graphs} cannot look at the loss: add --no-check-for-nan-in-loss-and-grad")
    if settings.ksa.anneal_start is not None:
        raise UsageError(f"{graphs} would repeat one annealing coefficient: drop it or --ksa-anneal-start")
    if args.context_parallel_size > 1:
        raise UsageError(
            f"{graphs} is not checked with --context-parallel-size {args.context_parallel_size}: use 1, or "
            "--cuda-graph-impl none"
        )


def _check_context_parallel(args: argparse.Namespace, feature: str) -> None:
    """Refuse the kinds of context parallelism that exist for Transformer Engine's attention only."""
    size, tp = args.context_parallel_size, args.tensor_model_parallel_size
    if args.hybrid_context_parallel:
        raise UsageError(f"{feature} does not go with --hybrid-context-parallel: drop it")
    for kind in args.cp_comm_type:
        if kind not in CP_COMM_TYPES:
            raise UsageError(
                f"{feature} does not go with --cp-comm-type {kind}: use p2p (halos and gathered summaries) or a2a"
            )
    if "a2a" not in args.cp_comm_type:
        return
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    heads, groups = args.num_attention_heads // tp, max(groups // tp, 1)
    if heads % size:
        largest = max(divisor for divisor in range(1, heads + 1) if heads % divisor == 0 and divisor <= size)
        raise UsageError(
            f"--cp-comm-type a2a divides the {heads} attention heads of a tensor-parallel rank among "
            f"--context-parallel-size {size} ranks: use {largest}, or p2p"
        )
    if groups % size and size % groups:
        raise UsageError(
            f"--cp-comm-type a2a needs the {groups} K/V heads of a tensor-parallel rank to be a multiple or a divisor "
            f"of --context-parallel-size {size}: use {groups}, or p2p"
        )


def adapt_trainer(args: argparse.Namespace, settings: RunSettings) -> None:
    """Tell Megatron's trainer, after its own validation, what the summary rows change.

    The dataset makes no text-by-text mask, and pipeline stages exchange text and summary rows.
    """
    adapt_async_save(args)
    if settings.is_megatron:
        return
    args.create_attention_mask_in_dataloader = False
    args.harpe_resolved_bases = settings.bases
    # A later stage finds in the checkpoint where this one started.
    args.ksa_initial_coefficient, args.ksa_train = settings.ksa.initial_coefficient, settings.train
    # The fused rotation assumes one row of angles for all heads and samples.
    args.apply_rope_fusion = False
    if settings.ksa.enabled and args.pipeline_model_parallel_size > 1:
        if args.virtual_pipeline_model_parallel_size is None:
            args.decoder_seq_length = settings.ksa.rows.total_rows(args.seq_length)
            if settings.distill.enabled:
                args.decoder_seq_length += args.seq_length
        else:
            args.variable_seq_lengths = True
            # Megatron's check of variable lengths looks at the MoE dispatcher even of dense models.
            args.moe_token_dispatcher_type = "alltoall"
