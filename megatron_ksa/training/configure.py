"""Command line to configuration: everything that happens before Megatron's `pretrain` takes over."""

import argparse
import contextlib
import io
from collections.abc import Callable

from megatron.core.optimizer import Adam
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.global_vars import set_global_variables

from megatron_ksa.checkpoint.checked_load import checked_load
from megatron_ksa.checkpoint.checked_save import checked_finalize, checked_save
from megatron_ksa.checkpoint.dense import check_checkpoint, dense_start
from megatron_ksa.checkpoint.model_sizes import check_adam, check_order
from megatron_ksa.checkpoint.run_folder import restore_tracker
from megatron_ksa.checkpoint.stored_args import load_stored_args
from megatron_ksa.checkpoint.to_load import checkpoint_to_load, only_weights
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.run_report import run_report
from megatron_ksa.data_tools.indexed import check_ids, check_indexed_dataset
from megatron_ksa.data_tools.loss_masks import masked_prefixes
from megatron_ksa.kernels.dispatch import force_reference, take_apart
from megatron_ksa.kernels.unchecked import take_unchecked
from megatron_ksa.model.builder import dense_config_from_args, model_config_from_args
from megatron_ksa.model.prepare import prepare_config
from megatron_ksa.training.annealing import annealed, is_annealed_in_graphs
from megatron_ksa.training.arguments import adapt_trainer, settings_from_args
from megatron_ksa.training.blend import check_documents, dataset_prefixes
from megatron_ksa.training.first_scales import FirstScales
from megatron_ksa.training.flag_rules import check_flags, check_run, check_start
from megatron_ksa.training.given import forget_given, given_flags
from megatron_ksa.training.layer_choice import choose_layers
from megatron_ksa.training.model_hooks import model_hooks
from megatron_ksa.training.recompute_fit import Fit
from megatron_ksa.training.refusals import REFUSALS, megatron_refusals
from megatron_ksa.training.stages import resolve_start
from megatron_ksa.training.step_log import StepLog
from megatron_ksa.upstream import (
    checkpoint_sums,
    dataset_reads,
    flops,
    late_checks,
    save_processes,
    sgd_resume,
    tracker,
)
from megatron_ksa.upstream.patches import Patch
from megatron_ksa.upstream.trainer import FINALIZE_SAVE, LOAD_CHECKPOINT, SAVE_CHECKPOINT, TRAIN_STEP, TRAINING_LOG

# Tokens of each dataset that are compared with the vocabulary: among so many, ids of another tokenizer show.
SAMPLED_TOKENS = 1_000_000


def parse_flags() -> argparse.Namespace:
    """The command line, before anything on a disk is looked at.

    Raises:
        UsageError: flags that are refused by themselves.
    """
    # --yaml-cfg is read here, before it can be refused.
    with megatron_refusals(argparse.Namespace()):
        args = parse_args()
    check_flags(args, with_ksa=False)
    check_run(args)
    return args


def read_settings(args: argparse.Namespace) -> RunSettings:
    """Check the flags against each other, the checkpoint and the data, this project's first: a mistake costs one line.

    Call it where no other run writes `--save` (`only_writer`): what is read of a checkpoint here is loaded later.

    Args:
        args: from `parse_flags`; changed in place.

    Raises:
        UsageError: a mistake in the flags, or data files or checkpoints that are missing or truncated.
    """
    given = given_flags(args)
    restore_tracker(args)
    check_start(args)
    if args.use_checkpoint_args:
        with megatron_refusals(args), contextlib.nullcontext() if args.rank == 0 else _quietly():
            load_stored_args(args, given)
    settings = settings_from_args(args)
    if not settings.is_megatron:
        check_flags(args, with_ksa=True)
    difference = check_checkpoint(args, settings)
    if difference and args.rank == 0:
        print(difference, flush=True)
    stored = checkpoint_to_load(args)
    if not settings.is_megatron and (chosen := choose_layers(args, stored)) and args.rank == 0:
        print(chosen, flush=True)
    # Among the arguments of this run's checkpoints.
    args.adam_library = Adam.__module__.partition(".")[0]
    if stored is not None:
        check_order(stored, args, only_weights(args))
        check_adam(stored, args, only_weights(args))
    settings = resolve_start(args, settings)
    prefixes = dataset_prefixes(args)
    for prefix in prefixes:
        check_indexed_dataset(prefix)
    if settings.data.response_loss_only:
        masked_prefixes(prefixes)
    forget_given(args)
    # Every exception of its validation is a refusal.
    with megatron_refusals(args, (*REFUSALS, RuntimeError, ImportError)):
        validate_args(args)
        check_documents(args)
        set_global_variables(args)
    # The tokenizer has told the rows of the embedding; training would end in an index error.
    if args.rank == 0 and args.padded_vocab_size is not None:
        for prefix in prefixes:
            check_ids(prefix, args.padded_vocab_size, None if settings.data.check_token_ids else SAMPLED_TOKENS)
    adapt_trainer(args, settings)
    if args.rank == 0 and args.save and args.ckpt_format != "torch_dist" and settings.checkpoint.content_sums:
        print(
            f"--ckpt-format {args.ckpt_format}: no sizes and sums of its files are stored, damage in them is loaded: "
            "--ckpt-format torch_dist stores them",
            flush=True,
        )
    return settings


def _quietly() -> contextlib.redirect_stdout:
    return contextlib.redirect_stdout(io.StringIO())


def configure(args: argparse.Namespace, settings: RunSettings, fit: Fit | None = None) -> PretrainConfigContainer:
    """Megatron's configuration with this project's model; Megatron's own model where KSA and HARPE are off.

    Args:
        fit: chooses the model's recompute, with `--recompute-to-fit`.

    Raises:
        UsageError: settings that Megatron's configuration does not accept.
    """
    force_reference(settings.kernels.reference)
    take_unchecked(settings.kernels.unchecked)
    take_apart(_apart(args, settings))
    # Some of the checks in Megatron's configurations raise RuntimeError.
    with megatron_refusals(args, (*REFUSALS, RuntimeError)):
        if settings.is_megatron:
            model = dense_config_from_args(args)
        else:
            model = model_config_from_args(args, settings.ksa, settings.bases)
            model.reset_documents = args.reset_position_ids
            model.train, model.distill = settings.train, settings.distill
            prepare_config(
                model.transformer,
                settings.ksa,
                args.seq_length,
                bases=settings.bases,
                decoder_seq_length=args.decoder_seq_length,
                distils=settings.distill.enabled,
            )
            if args.rank == 0:
                print(run_report(args, settings), flush=True)
        model.pre_wrap_hooks.extend([*model_hooks(args), *([] if fit is None else [fit])])
        return pretrain_cfg_container_from_args(args, model)


def _apart(args: argparse.Namespace, settings: RunSettings) -> set[str]:
    """Fusions that are off: by `--kernels-apart`, or because of the run's other flags."""
    apart = set(settings.kernels.apart)
    # A layer's CUDA graph repeats one micro-batch's products for all: it would overwrite the others' gradients. Where
    # parameters share the gradients' buffer, an iteration finds parameters in it.
    if args.cuda_graph_impl == "local" or args.reuse_grad_buf_for_mxfp8_param_ag:
        apart.add("gradients")
    return apart


def trainer_patches(
    args: argparse.Namespace, settings: RunSettings, log: StepLog, still_writes: Callable[[], None] = lambda: None
) -> list[Patch]:
    """What a run with these settings replaces in Megatron's trainer; after its validation.

    Args:
        still_writes: raises where another run took `--save` over; called before a checkpoint becomes the newest.
    """
    in_graphs = is_annealed_in_graphs(args, settings.ksa)
    delayed = bool(args.fp8) and args.fp8_recipe == "delayed"
    return [
        LOAD_CHECKPOINT.given(lambda load: checked_load(dense_start(load, args, settings), args, settings)),
        SAVE_CHECKPOINT.given(lambda save: checked_save(save, args)),
        FINALIZE_SAVE.given(lambda finalize: checked_finalize(finalize, args)),
        *checkpoint_sums.patches(settings.checkpoint.content_sums),
        *save_processes.patches(args.async_save),
        *dataset_reads.patches(args.padded_vocab_size),
        *tracker.patches(still_writes),
        *sgd_resume.PATCHES,
        *flops.patches(settings),
        *late_checks.patches(args.check_for_nan_in_loss_and_grad),
        *([TRAINING_LOG.given(log.extended)] if log.is_needed else []),
        # Its passes run inside what writes the coefficient, and outside what looks at a step's passes.
        *([TRAIN_STEP.given(FirstScales(args, log).train_step)] if delayed else []),
        *([TRAIN_STEP.given(lambda step: annealed(step, args, settings.ksa))] if in_graphs else []),
    ]
