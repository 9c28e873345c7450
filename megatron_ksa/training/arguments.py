"""Megatron's command line with this project's flags, and the checks that need both."""

import argparse
import enum
import functools

from megatron_ksa.config.checkpoint import CheckpointConfig
from megatron_ksa.config.data import DataConfig
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.fit import FitConfig
from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.config.kernels import KernelConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.options import add_config_arguments, config_from_args
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.config.stage import StageConfig
from megatron_ksa.config.watch import WatchConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.model.prepare import FLAGS, check_distillation, check_length, check_settings, pipeline_rows
from megatron_ksa.training.async_save import adapt_async_save, async_save_defaults, check_async_save
from megatron_ksa.training.fit_rules import check_fit
from megatron_ksa.training.given import given_flags, record_given
from megatron_ksa.training.layout_rules import REQUIRED, check_layout, check_sizes
from megatron_ksa.training.stages import check_stage, check_trained
from megatron_ksa.upstream import command_line
from megatron_ksa.upstream.patches import Applied, apply


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
        add_config_arguments(parser, CheckpointConfig, "checkpoint", "checkpoint files")
        add_config_arguments(parser, WatchConfig, "watch", "watch over ranks")
        add_config_arguments(parser, FitConfig, "recompute", "recompute to fit")
        for action in parser._actions:
            if action.dest == "position_embedding_type":
                action.choices = [*action.choices, "harpe"]
            if action.choices and isinstance(first := next(iter(action.choices)), enum.Enum):
                action.type = functools.partial(_member, type(first))
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
    if not (args.check_for_nan_in_loss_and_grad or args.check_for_spiky_loss or args.check_for_large_grads):
        # Without checks nothing asks for a second run of an iteration, but Megatron would wait for the device to ask.
        defaults["rerun_mode"] = "disabled"
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
        config_from_args(CheckpointConfig, args, "checkpoint"),
        config_from_args(WatchConfig, args, "watch"),
        config_from_args(FitConfig, args, "recompute"),
    )
    check_stage(args, settings)
    check_fit(args, settings)
    if not settings.is_megatron:
        _check(args, settings)
        check_trained(args, settings)
    elif not args.multi_latent_attention and all(getattr(args, name) is not None for name in REQUIRED):
        check_layout(args)
    return settings


def _member(kind: type[enum.Enum], name: str) -> enum.Enum:
    """The member of a flag's enumeration by its name; Megatron's own look-up ends in a KeyError."""
    try:
        return kind[name]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(kind.__members__)}") from None


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
    """Refuse what KSA and HARPE cannot work with: the list of `prepare_config`, and what only the trainer has."""
    feature = FLAGS.feature(settings.ksa, settings.bases)
    for name in (name for name in REQUIRED if getattr(args, name) is None):
        raise UsageError(f"{feature} needs --{name.replace('_', '-')}")
    refused = [
        (args.sft, "--sft", "the batch reader serves pretraining data; drop it"),
        (args.spec, "--spec", "the layer specs are this project's own; drop it"),
    ]
    for active, flag, way_out in refused:
        if active:
            raise UsageError(f"{feature} does not go with {flag}: {way_out}")
    if args.reset_position_ids != args.reset_attention_mask:
        missing = "--reset-attention-mask" if args.reset_position_ids else "--reset-position-ids"
        raise UsageError(f"{feature} resets documents with both flags or neither: {missing} is missing")
    if args.cuda_graph_impl == "full_iteration" and args.check_for_nan_in_loss_and_grad:
        raise UsageError(
            "--cuda-graph-impl full_iteration cannot look at the loss: add --no-check-for-nan-in-loss-and-grad"
        )
    if args.fp8 and args.fp8_recipe == "delayed" and args.ckpt_format == "torch":
        raise UsageError(
            "--fp8-recipe delayed does not go with --ckpt-format torch: its scales are pickles, which are looked "
            "through in --ckpt-format torch_dist alone: use that one"
        )
    config = _as_config(args)
    check_settings(
        config,
        settings.ksa,
        FLAGS,
        bases=settings.bases,
        position_embedding_type=args.position_embedding_type,
        rope_scaling=args.use_rope_scaling,
    )
    if settings.distill.enabled:
        check_distillation(config, FLAGS.name)
    check_length(config, settings.ksa, args.seq_length, args.micro_batch_size)
    check_layout(args)


def _as_config(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments under the names of `TransformerConfig`'s fields."""
    own_layers = args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    names = {
        "num_moe_experts": args.num_experts,
        "num_query_groups": groups,
        "heterogeneous_block_specs": bool(own_layers),
    }
    return argparse.Namespace(**{**vars(args), **names})


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
            args.decoder_seq_length = pipeline_rows(settings.ksa, args.seq_length, distils=settings.distill.enabled)
        else:
            args.variable_seq_lengths = True
            # Megatron's check of variable lengths looks at the MoE dispatcher even of dense models.
            args.moe_token_dispatcher_type = "alltoall"
