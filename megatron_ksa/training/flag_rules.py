"""Flags of Megatron that are refused by name, and rules between flags for which Megatron has assertions alone."""

import argparse
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.training.blend import check_split
from megatron_ksa.training.given import given_names
from megatron_ksa.training.megatron_flags import NEVER, WITHOUT_KSA, Refused


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


def check_run(args: argparse.Namespace) -> None:
    """Check what a run needs beside the model.

    Raises:
        UsageError: naming the flags.
    """
    check_split(args.split)
    if args.save is not None and (args.save_interval is None or args.save_interval < 1):
        given = "is missing" if args.save_interval is None else f"is {args.save_interval}"
        raise UsageError(f"--save {args.save} needs the number of iterations between saves: --save-interval {given}")
    logits = args.logits_load_dir
    if logits is not None and "://" not in logits and not any(Path(logits).glob("*.tar")):
        raise UsageError(f"--logits-load-dir {logits}: no .tar files that --logits-save-dir writes are there")
    if logits is not None and not (args.bf16 or args.fp16):
        raise UsageError(
            "--logits-load-dir needs --bf16 or --fp16: Megatron's loss overwrites float32 logits before the comparison"
        )
    if args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None:
        raise UsageError("--use-checkpoint-args takes the model from a checkpoint: --load is missing")
