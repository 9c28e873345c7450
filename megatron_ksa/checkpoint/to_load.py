"""The checkpoint that the trainer is going to load, looked at before anything is built.

Raised here, a mistake costs one line; raised where Megatron loads, it comes after minutes of start-up.
"""

import argparse
import pickle
from pathlib import Path

import torch
from megatron.training import checkpointing

from megatron_ksa.checkpoint.integrity import is_distributed, way_out
from megatron_ksa.checkpoint.load import RELEASE, StoredCheckpoint, find_checkpoint, iteration_folder, stored_settings
from megatron_ksa.errors import UsageError
from megatron_ksa.upstream.checkpoint_records import CONFIG, METADATA


def load_folder(args: argparse.Namespace) -> str | None:
    """The folder that Megatron loads from: `--load`, or `--pretrained-checkpoint` where nothing is there yet."""
    return args.load if checkpointing.checkpoint_exists(args.load) else args.pretrained_checkpoint


def only_weights(args: argparse.Namespace) -> bool:
    """Whether training starts from the checkpoint's weights, without its optimizer and iteration."""
    return args.finetune or load_folder(args) != args.load


def checkpoint_to_load(args: argparse.Namespace) -> StoredCheckpoint | None:
    """The iteration that `--load`, `--pretrained-checkpoint` and `--ckpt-step` name; None where there is none yet.

    None too of a format whose arguments only Megatron's own reader finds.

    Raises:
        UsageError: an iteration that is missing, or a checkpoint that cannot be read.
    """
    if getattr(args, "enable_msc", False):
        # Not a folder; `--enable-msc` is refused where what a checkpoint holds must be compared.
        return None
    if args.ckpt_step is not None and args.ckpt_step < 1:
        raise UsageError(f"--ckpt-step {args.ckpt_step}: iterations are numbered from 1")
    folder = _newer_non_persistent(args) or load_folder(args)
    if not checkpointing.checkpoint_exists(folder):
        if args.ckpt_step:
            named = "no folder" if args.load is None else f"--load {args.load}"
            raise UsageError(f"--ckpt-step {args.ckpt_step}: {named} holds no checkpoint; give the folder that has it")
        return None
    step = args.ckpt_step or None if folder == load_folder(args) else None
    try:
        path = iteration_folder(Path(folder), step)
    except UsageError as error:
        raise UsageError(f"--ckpt-step {step}: {error}" if step else str(error)) from None
    if is_distributed(path):
        return find_checkpoint(Path(folder), step)
    if args.ckpt_format == "torch_dist" and (path / METADATA).is_file():
        # Megatron would take it for a checkpoint of --ckpt-format torch_dcp.
        raise UsageError(f"{path / CONFIG} is missing; {way_out(path)}")
    return _legacy(path, folder)


def _newer_non_persistent(args: argparse.Namespace) -> str | None:
    """The folder of `--non-persistent-ckpt-type global` where its iteration is what Megatron takes.

    Those of type local lie in memory or on other machines; they come from the same run as the folder's.
    """
    if getattr(args, "non_persistent_ckpt_type", None) != "global" or args.load is None:
        return None
    folder = args.non_persistent_global_ckpt_dir or str(Path(args.load) / "non_persistent")
    newest = [_newest(where) for where in (folder, args.load)]
    return folder if newest[0] >= 0 and newest[0] >= (args.ckpt_step or newest[1]) else None


def _newest(folder: str) -> int:
    if not checkpointing.checkpoint_exists(folder):
        return -1
    name = iteration_folder(Path(folder)).name
    return 0 if name == RELEASE else int(name.removeprefix("iter_"))


def _legacy(path: Path, folder: str) -> StoredCheckpoint | None:
    """Arguments of `--ckpt-format torch`, without reading the tensors beside them."""
    release = path.name == RELEASE
    iteration = 0 if release else int(path.name.removeprefix("iter_"))
    file = checkpointing.find_checkpoint_rank_0(folder, iteration, release)
    if file is None or not Path(file).is_file():
        return None
    try:
        args = torch.load(file, map_location="cpu", mmap=True).get("args")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return None if args is None else StoredCheckpoint(path, iteration, args, stored_settings(args))
