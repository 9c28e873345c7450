"""A checkpoint's KSA and HARPE settings must be those of the flags."""

import argparse
import dataclasses
from pathlib import Path

from megatron.training import checkpointing
from megatron.training.utils import print_rank_0

from megatron_ksa.checkpoint.load import TRACKER, find_checkpoint
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination, flag
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError


def check_identity(checkpoint_args: argparse.Namespace, settings: RunSettings) -> None:
    """Compare the settings that a checkpoint's weights depend on with the flags.

    Args:
        checkpoint_args: Megatron's arguments as saved in the checkpoint.

    Raises:
        UsageError: the first setting that differs, both values and its flag.
    """
    identity = settings.ksa.identity()
    for field in dataclasses.fields(KSAConfig):
        if field.name not in identity or not (settings.ksa.enabled or field.name == "enabled"):
            continue
        saved = getattr(checkpoint_args, destination(field, "ksa"), field.default)
        if saved != identity[field.name]:
            raise UsageError(
                f"{flag(field, 'ksa')}: the checkpoint was written with {saved}, the flags say {identity[field.name]}: "
                f"give the checkpoint's value"
            )
    difference = check_bases(checkpoint_args, settings)
    if difference:
        print_rank_0(difference)


def check_bases(checkpoint_args: argparse.Namespace, settings: RunSettings) -> str | None:
    """Compare the checkpoint's base set with that of the flags.

    `--harpe-override-checkpoint-bases` says that another is meant.

    Returns:
        What to log where the sets differ and that is meant.

    Raises:
        UsageError: the sets differ and nobody said so.
    """
    saved = getattr(checkpoint_args, "harpe_resolved_bases", None)
    if saved == settings.bases:
        return None
    difference = f"the checkpoint was written with {_describe(saved)}, the flags say {_describe(settings.bases)}"
    if not settings.override_bases:
        raise UsageError(
            f"--harpe-bases: {difference}: give the checkpoint's bases, or --harpe-override-checkpoint-bases "
            f"to train with others"
        )
    return f"--harpe-override-checkpoint-bases: {difference}: training goes on with those of the flags"


def _describe(bases: tuple[float, ...] | None) -> str:
    return "no HARPE" if bases is None else ",".join(f"{base:g}" for base in bases)


def install_identity_check(settings: RunSettings) -> None:
    """Run `check_identity` wherever Megatron compares a checkpoint's arguments with the flags."""
    check_checkpoint_args = checkpointing.check_checkpoint_args

    def check(checkpoint_args: argparse.Namespace, skip_args: set[str] | None = None) -> None:
        check_identity(checkpoint_args, settings)
        check_checkpoint_args(checkpoint_args, skip_args)

    checkpointing.check_checkpoint_args = check


def check_finetune(args: argparse.Namespace, settings: RunSettings) -> None:
    """Check the bases of the checkpoint that `--finetune` starts from.

    Megatron compares nothing then, and other KSA settings are meant; other bases are not, unless the flag says so.

    Raises:
        UsageError: as `check_bases`.
    """
    if not (args.finetune and args.load and (Path(args.load) / TRACKER).is_file() and args.ckpt_format == "torch_dist"):
        return
    difference = check_bases(find_checkpoint(Path(args.load), args.ckpt_step).args, settings)
    if difference and args.rank == 0:
        print(difference, flush=True)
