"""Megatron's trainer on a machine without a GPU: `cuda` stands for the CPU, gloo for NCCL."""

import logging
import os
import sys
import warnings
from typing import Any

import torch

from megatron_ksa.upstream.cpu.cuda_calls import install_cuda_calls
from megatron_ksa.upstream.cpu.devices import CudaMeansCpu

_MODE = CudaMeansCpu()
_state = {"active": False}


def activate_cpu_platform() -> bool:
    """Make the rest of the process train on the CPU if, and only if, it has no CUDA device.

    Call it before Megatron is imported; it imports Megatron itself. It lasts as long as the process: device arguments
    are redirected in the calling thread, `torch.cuda` calls of the trainer are replaced, and `torch.compile` is turned
    off, since Megatron's jitted functions do not survive the redirection and gain nothing on a CPU.

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
    _adapt_megatron()
    install_cuda_calls()
    _MODE.__enter__()
    if os.environ.get("RANK", "0") == "0":
        threads = torch.get_num_threads()
        print(f"no CUDA device found: training on the CPU with gloo, {threads} thread(s) a process", flush=True)
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


def _adapt_megatron() -> None:
    """Change the places of Megatron that ask for CUDA itself, or for what only NCCL has."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training.initialize import initialize_megatron

    from megatron_ksa.upstream.cpu.gloo import install_uneven_collectives

    install_uneven_collectives()
    # torch would put the call off until CUDA is initialised.
    random._lazy_call = lambda call, **kwargs: call()
    logging.getLogger(random.__name__).addFilter(_is_not_about_one_generator)
    # It hands on what is not on a GPU as it is, but sizes of an exchange of experts' tokens cannot be tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = _on_cpu
    # The trainer calls it without arguments; `allow_no_cuda`, its first parameter, becomes True.
    initialize_megatron.__defaults__ = (True, *initialize_megatron.__defaults__[1:])


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _is_not_about_one_generator(record: logging.LogRecord) -> bool:
    # CPU and "GPU" random state are one generator here, so a fork of the latter moves the former.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()
