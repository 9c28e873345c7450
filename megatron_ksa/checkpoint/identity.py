"""A checkpoint's KSA and HARPE settings must be those of the flags."""

import argparse
import dataclasses

from megatron.training import checkpointing

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination, flag
from megatron_ksa.errors import UsageError
from megatron_ksa.training.arguments import ModelSettings


def check_identity(checkpoint_args: argparse.Namespace, settings: ModelSettings) -> None:
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
    saved = getattr(checkpoint_args, "harpe_resolved_bases", None)
    if saved != settings.bases:
        described = [_describe(bases) for bases in (saved, settings.bases)]
        raise UsageError(
            f"--harpe-bases: the checkpoint was written with {described[0]}, the flags say {described[1]}: "
            f"give the checkpoint's bases"
        )


def _describe(bases: tuple[float, ...] | None) -> str:
    return "no HARPE" if bases is None else ",".join(f"{base:g}" for base in bases)


def install_identity_check(settings: ModelSettings) -> None:
    """Run `check_identity` wherever Megatron compares a checkpoint's arguments with the flags."""
    check_checkpoint_args = checkpointing.check_checkpoint_args

    def check(checkpoint_args: argparse.Namespace, skip_args: set[str] | None = None) -> None:
        check_identity(checkpoint_args, settings)
        check_checkpoint_args(checkpoint_args, skip_args)

    checkpointing.check_checkpoint_args = check
