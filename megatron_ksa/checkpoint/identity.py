"""A checkpoint's KSA and HARPE settings must be those of the flags."""

import argparse
import dataclasses

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination, flag
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError


def check_identity(checkpoint_args: argparse.Namespace, settings: RunSettings) -> str | None:
    """Compare the settings that a checkpoint's weights depend on with the flags.

    Args:
        checkpoint_args: Megatron's arguments as saved in the checkpoint.

    Returns:
        What to log where the bases differ and that is meant.

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
    return check_bases(checkpoint_args, settings)


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
