"""Asynchronous saves (`--async-save`): the trainer goes on while another process writes the checkpoint.

Megatron 0.19.2 hands a save to a worker process that lives as long as the trainer and reads tensors from the GPU; by
default the worker of NVIDIA's resiliency extension, an optional package. On a CPU that worker dies looking for its GPU,
and would share the tensors that training goes on to change. There each save is written by a process of its own, forked
when the save is due: it keeps the memory of that moment.
"""

import argparse
import importlib.util

import torch

from megatron_ksa.errors import UsageError


def async_save_defaults() -> dict[str, object]:
    """Argument destination -> default that `--async-save` needs here: the worker, and one that is installed."""
    defaults: dict[str, object] = {"use_persistent_ckpt_worker": True}
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        defaults["async_strategy"] = "mcore"
    return defaults


def check_async_save(args: argparse.Namespace) -> None:
    """Refuse formats that Megatron does not write asynchronously.

    Raises:
        UsageError: `--ckpt-format torch`.
    """
    if args.async_save and args.ckpt_format == "torch":
        raise UsageError("--async-save does not go with --ckpt-format torch: use --ckpt-format torch_dist")


def adapt_async_save(args: argparse.Namespace) -> None:
    """Take a process for each save on a CPU; after Megatron's validation, which turns saves without the worker off."""
    if args.async_save and not torch.cuda.is_available():
        args.use_persistent_ckpt_worker = False
