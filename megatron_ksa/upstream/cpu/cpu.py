"""Megatron's trainer on a machine without a GPU: `cuda` stands for the CPU, gloo for NCCL."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from megatron_ksa.upstream.cpu import cuda_calls, devices, gloo
from megatron_ksa.upstream.patches import Patch, apply_for_good

_state = {"active": False}


def activate_cpu_platform() -> bool:
    """Make the rest of the process train on the CPU if, and only if, it has no CUDA device.

    Call it before Megatron is imported; it imports Megatron itself. It lasts as long as the process: device arguments
    are redirected, `torch.cuda` calls of the trainer are replaced, and `torch.compile` is turned off, since Megatron's
    jitted functions do not survive the redirection and gain nothing on a CPU.

    Returns:
        True on the CPU platform, False where a GPU is present (nothing is changed then).
    """
    if _state["active"]:
        return True
    if torch.cuda.is_available():
        return False
    _state["active"] = True
    _turn_off_dynamo()
    _silence_what_is_expected()
    # In this order: torch._dynamo, which Megatron imports, lists torch.cuda's own functions and wants each to be one.
    apply_for_good((*PATCHES, *gloo.PATCHES))
    apply_for_good(cuda_calls.PATCHES)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_not_about_one_generator)
    apply_for_good(devices.PATCHES)
    if os.environ.get("RANK", "0") == "0":
        threads = torch.get_num_threads()
        # Not on stdout, where a program may write its results.
        said = f"no CUDA device found: training on the CPU with gloo, {threads} thread(s) a process"
        print(said, file=sys.stderr, flush=True)
    return True


def _turn_off_dynamo() -> None:
    # torch reads the variable when torch._dynamo is imported, which Megatron's decorators do.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.config.disable = True


def _silence_what_is_expected() -> None:
    """Missing GPU packages and pinned memory are no news on a CPU."""
    for message in (
        ".*'pin_memory' argument is set as true",
        ".*Apex (is|are) not installed",
        "Only transformer-engine",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _is_not_about_one_generator(record: logging.LogRecord) -> bool:
    # CPU and "GPU" random state are one generator here, so a fork of the latter moves the former.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _allow_no_cuda(initialize_megatron: Callable) -> Callable:
    @wraps(initialize_megatron)
    def initialize(*args: Any, **options: Any) -> Any:
        return initialize_megatron(True, *args[1:], **options)

    return initialize


# The places of Megatron that ask for CUDA themselves.
PATCHES = (
    Patch(
        "megatron.core.tensor_parallel.random:_lazy_call",
        lambda original: lambda call, **options: call(),
        why="torch puts the call off until CUDA is initialised",
        expects="(callable, **kwargs)",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        lambda original: _on_cpu,
        why="it hands on what is not on a GPU as it is, but sizes of an exchange of experts' tokens cannot be tensors",
        expects="(tensor, as_numpy=False, record_stream=False)",
    ),
    Patch(
        "megatron.training.training:initialize_megatron",
        _allow_no_cuda,
        why="the trainer does not pass allow_no_cuda, its first parameter",
        expects="(allow_no_cuda=False, skip_mpu_initialization=False, get_embedding_ranks=None, "
        "get_position_embedding_ranks=None, store=None, skip_model_parallel_init=False, seed_pp_group=None, "
        "seed_dp_group=None, seed_tp_group=None, seed_ep_group=None, seed_etp_group=None, skip_random_seed=False)",
    ),
)
