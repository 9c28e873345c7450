"""What a chain is checked for before its first stage, so that a mistake does not cost the stages before it."""

import argparse
import math
import shlex
import shutil

from megatron_ksa.data_tools.indexed import check_indexed_dataset, sequence_lengths
from megatron_ksa.errors import UsageError
from megatron_ksa.training.blend import data_path_prefixes

MOST_SEED = 2**32 - 1
# The chain decides these for each stage, and reads from them how far it is; what its own flags set is said by those.
DECIDED = {
    "--save": "--work", "--load": "--work", "--finetune": "", "--pretrained-checkpoint": "--input", "--ckpt-step": "",
    "--use-checkpoint-args": "", "--train-samples": "--extend-steps", "--train-iters": "--extend-steps",
    "--seq-length": "--lengths", "--max-position-embeddings": "--lengths", "--micro-batch-size": "--micro-batch",
    "--global-batch-size": "--extend-batch", "--lr": "--extend-lr", "--min-lr": "--min-lr", "--seed": "--seed",
    "--lr-warmup-iters": "--warmup", "--lr-wsd-decay-iters": "--decay", "--save-interval": "--save-interval",
    "--data-path": "--data-path", "--ksa-layer-pattern": "--layer-pattern", "--ksa-chunk-size": "--chunk-size",
    "--ksa-summary-tokens": "--summary-tokens", "--ksa-window-chunks": "--window-chunks", "--no-ksa": "",
    "--ksa-distill": "--distil-steps", "--ksa-train": "", "--ksa-anneal-start": "--anneal-steps",
    "--ksa-anneal-end": "--anneal-steps", "--ksa-initial-coefficient": "", "--no-ksa-independent-projections": "",
}  # fmt: skip


def check_values(args: argparse.Namespace) -> None:
    """Refuse values that a later stage would refuse; no file is looked at.

    Raises:
        UsageError: naming the flag.
    """
    for name in ("distil_lr", "anneal_lr", "extend_lr", "min_lr", "warmup", "decay"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise UsageError(f"{_flag(name)} {value:g}: a number of at least 0 is needed")
    for name in ("micro_batch", "save_interval", "nproc_per_node", "evaluation_windows", "seed"):
        if getattr(args, name) < 1:
            raise UsageError(f"{_flag(name)} {getattr(args, name)}: at least 1")
    if args.seed > MOST_SEED:
        raise UsageError(f"--seed {args.seed}: at most {MOST_SEED}")
    for name in ("distil_batch", "anneal_batch", "extend_batch"):
        for batch in getattr(args, name):
            if batch < 1 or batch % args.micro_batch:
                raise UsageError(f"{_flag(name)} {batch}: a multiple of --micro-batch {args.micro_batch} is needed")
    if not args.work.name:
        raise UsageError(f"--work {args.work}: the name of a folder is needed")
    for word in args.trainer:
        if (flag := word.split("=")[0]) in DECIDED:
            way_out = f"use {DECIDED[flag]}" if DECIDED[flag] else "drop it"
            raise UsageError(f"{flag} after -- would be given to every stage, and the chain decides it: {way_out}")
    _check_launcher(args)


def check_inputs(args: argparse.Namespace) -> None:
    """Refuse data that is missing, truncated, or too short to be evaluated.

    Raises:
        UsageError: naming the file.
    """
    for prefix in data_path_prefixes(args.data_path):
        check_indexed_dataset(prefix)
    if args.validation:
        _check_validation(args.validation, max(args.lengths))


def _check_validation(prefix: str, length: int) -> None:
    try:
        check_indexed_dataset(prefix)
    except UsageError as error:
        raise UsageError(f"--validation: {error}") from None
    tokens = int(sequence_lengths(prefix).sum())
    if tokens <= length:
        raise UsageError(
            f"--validation {prefix}: {tokens:,} tokens are too few for windows of {length:,}: give more, or shorter "
            f"--lengths"
        )


def _check_launcher(args: argparse.Namespace) -> None:
    if args.launcher is None:
        return
    try:
        words = shlex.split(args.launcher)
    except ValueError as error:
        raise UsageError(f"--launcher {args.launcher!r} is no command: {error}") from None
    if not words:
        raise UsageError(f"--launcher {args.launcher!r} is no command: leave it out for python or torchrun")
    if not args.dry_run and shutil.which(words[0]) is None:
        raise UsageError(f"--launcher {args.launcher}: there is no program {words[0]}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
