"""Flags of Megatron that are refused by name, and rules between flags for which Megatron has assertions alone."""

import argparse
import math
import os
from pathlib import Path

import torch
from megatron.training.checkpointing import checkpoint_exists

from megatron_ksa.checkpoint.to_load import load_folder
from megatron_ksa.errors import UsageError
from megatron_ksa.platform.defaults import importable
from megatron_ksa.training.blend import check_split, sources
from megatron_ksa.training.given import given_names
from megatron_ksa.training.megatron_flags import NEVER, WITHOUT_KSA, Refused

# Megatron takes any number for these, and trains on with what makes no sense.
NOT_NEGATIVE = (
    "init_method_std", "lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction",
    "lr_wsd_decay_iters", "lr_wsd_decay_samples", "clip_grad", "weight_decay", "adam_eps",
)  # fmt: skip

# Megatron's index of a dataset: where a sample begins (two int32 at least), and its place in the order (uint32).
INDEX_BYTES = 12


def check_flags(args: argparse.Namespace, with_ksa: bool) -> None:
    """Refuse the flags given by hand that would do nothing here, or nothing with KSA and HARPE.

    Args:
        with_ksa: look for those that KSA and HARPE do not go with; otherwise for those refused always.

    Raises:
        UsageError: the first such flag, why it is refused and the way out.
    """
    refused = WITHOUT_KSA if with_ksa else NEVER
    for flag, names in given_names(args):
        reason = next((group for group in refused if names & group.flags), None)
        if reason is not None:
            raise UsageError(_line(args, flag, reason, with_ksa))


def _line(args: argparse.Namespace, flag: str, reason: Refused, with_ksa: bool) -> str:
    if not with_ksa:
        return f"{flag} is not accepted here: {reason.why}"
    feature = "--ksa" if args.ksa else "--position-embedding-type harpe"
    return f"{feature} does not go with {flag}: {reason.why}"


def check_start(args: argparse.Namespace) -> None:
    """Check that data and what a run is to start from are there; Megatron would take random data and weights.

    Raises:
        UsageError: naming the flag.
    """
    if not any(sources(args).values()):
        raise UsageError(f"no data is given: {', '.join(sources(args))}: give one of them")
    if getattr(args, "enable_msc", False):
        return
    pretrained = args.pretrained_checkpoint
    if pretrained is not None and not checkpoint_exists(args.load) and not checkpoint_exists(pretrained):
        raise UsageError(f"--pretrained-checkpoint {pretrained} holds no checkpoint")
    if args.use_checkpoint_args and not any(checkpoint_exists(folder) for folder in (load_folder(args), pretrained)):
        raise UsageError(
            f"--use-checkpoint-args takes the model from a checkpoint: --load {args.load or '(not given)'} has none"
        )
    if args.finetune and not checkpoint_exists(load_folder(args)):
        raise UsageError(
            f"--finetune starts from the weights of a checkpoint: --load {args.load or '(not given)'} has none"
        )


def _check_splits(args: argparse.Namespace) -> None:
    """Refuse one blend whose `--split` leaves nothing to train on or, with an evaluation to come, to evaluate."""
    if args.split is None or any((args.train_data_path, args.valid_data_path, args.per_split_data_args_path)):
        return
    shares = [float(part) for part in args.split.split(",")]
    if shares[0] == 0 and not args.skip_train:
        raise UsageError(f"--split {args.split} leaves no data to train on: its first number is above 0")
    if (args.full_validation or args.eval_iters) and not sum(shares[1:2]):
        raise UsageError(
            f"--split {args.split} leaves no data for the {args.eval_iters} iterations of an evaluation: give "
            "--eval-iters 0, or a second number above 0"
        )


def check_run(args: argparse.Namespace) -> None:
    """Check what a run needs beside the model.

    Raises:
        UsageError: naming the flags.
    """
    check_split(args.split)
    if args.save is not None and (args.save_interval is None or args.save_interval < 1):
        given = "is missing" if args.save_interval is None else f"is {args.save_interval}"
        raise UsageError(f"--save {args.save} needs the number of iterations between saves: --save-interval {given}")
    if args.wandb_project and args.save is None and not args.wandb_save_dir:
        raise UsageError(f"--wandb-project {args.wandb_project} needs a folder: give --wandb-save-dir, or --save")
    rejected = args.result_rejected_tracker_filename
    if rejected and not Path(rejected).parent.is_dir():
        raise UsageError(f"--result-rejected-tracker-filename {rejected}: {Path(rejected).parent} is no folder")
    if args.phase_transition_iterations and args.train_samples is None:
        raise UsageError("--phase-transition-iterations goes with --train-samples: give that in place of --train-iters")
    if args.dataloader_type == "external":
        raise UsageError("--dataloader-type external is for data of another program: use single or cyclic")
    logits = args.logits_load_dir
    if logits is not None and "://" not in logits and not any(Path(logits).glob("*.tar")):
        raise UsageError(f"--logits-load-dir {logits}: no .tar files that --logits-save-dir writes are there")
    if logits is not None and not (args.bf16 or args.fp16):
        raise UsageError(
            "--logits-load-dir needs --bf16 or --fp16: Megatron's loss overwrites float32 logits before the comparison"
        )
    if not args.train_iters and not args.train_samples and not args.skip_train:
        raise UsageError("neither --train-iters nor --train-samples says how long to train: give one of them")
    _check_index(args)
    _check_splits(args)
    if args.load is not None and "://" not in args.load and Path(args.load).exists() and not Path(args.load).is_dir():
        raise UsageError(f"--load {args.load} is no folder")
    if not 0 < args.rotary_percent <= 1:
        raise UsageError(f"--rotary-percent {args.rotary_percent:g}: a share above 0, at most 1")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: a number of at least 0 is needed")
    _check_machine(args)


def _check_index(args: argparse.Namespace) -> None:
    """Refuse more samples than this machine's memory holds an index of; Megatron would fill it for hours, then end."""
    samples = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or args.micro_batch_size or 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := samples * INDEX_BYTES) > memory:
        flag = f"--train-samples {args.train_samples}" if args.train_samples else f"--train-iters {args.train_iters}"
        raise UsageError(
            f"{flag[:60]}: the index of {samples:.4g} samples takes {needed / 1e9:.4g} GB, this machine has "
            f"{memory / 1e9:.4g}: train for less, and go on from the checkpoint with --load"
        )


def _check_machine(args: argparse.Namespace) -> None:
    """Refuse what needs a package or a GPU that is not here, and devices in the place of a tokenizer's files."""
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(args, name, None)
        if path and Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise UsageError(f"--{name.replace('_', '-')} {path}: neither a regular file nor a folder")
    if args.transformer_impl == "transformer_engine" and not importable("transformer_engine.pytorch"):
        raise UsageError(
            "--transformer-impl transformer_engine: the package transformer-engine is not installed, or does not load; "
            "install it (pip install '.[te]'), or use --transformer-impl local"
        )
    if args.fp8 and torch.cuda.is_available():
        needed = (9, 0) if args.fp8_recipe == "blockwise" else (8, 9)
        if (found := torch.cuda.get_device_capability()) < needed:
            raise UsageError(
                f"--fp8-format with --fp8-recipe {args.fp8_recipe} needs a GPU of compute capability {needed[0]}."
                f"{needed[1]}, this one has {found[0]}.{found[1]}: drop --fp8-format"
            )
    if "layernorm" in (args.recompute_modules or ()) and not importable("transformer_engine.pytorch"):
        raise UsageError(
            "--recompute-modules layernorm asks Transformer Engine for its FP8 state in Megatron 0.19.2, and the "
            "package is not installed: use --recompute-to-fit, which recomputes norms without it, or leave it out"
        )
    fits_this_gpu = getattr(args, "recompute_to_fit", None) is not None and args.recompute_to_fit_gpu is None
    if fits_this_gpu and not torch.cuda.is_available():
        raise UsageError(
            "--recompute-to-fit fills a GPU's memory, and no GPU is here: drop it, or give --recompute-to-fit-gpu the "
            "GiB of one that is elsewhere; tools/plan_cluster.py --memory plans with it"
        )
    if args.profile and not args.use_pytorch_profiler and not torch.cuda.is_available():
        raise UsageError("--profile marks a range for CUDA's profiler, and there is no GPU: add --use-pytorch-profiler")
