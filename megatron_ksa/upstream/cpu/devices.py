"""`cuda` devices stand for the CPU in torch's constructors and moves, to which the trainer passes them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device

from megatron_ksa.upstream.patches import Patch

CPU = torch.device("cpu")


def cpu_for_cuda(device: Any) -> Any:
    """The CPU for a CUDA device (string, `torch.device` or index); every other value unchanged."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.partition(":")[0] == "cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _constructor(original: Callable) -> Callable:
    """Make a tensor that is asked for on `cuda` on the CPU, and never in pinned memory."""

    @wraps(original)
    def construct(*args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return construct


def _to(original: Callable) -> Callable:
    @wraps(original)
    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = cpu_for_cuda(kwargs["device"])
        # A device comes first.
        return original(tensor, *map(cpu_for_cuda, args[:1]), *args[1:], **kwargs)

    return to


def _cuda(original: Callable) -> Callable:
    @wraps(original)
    def cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.to(CPU)

    return cuda


def _type(original: Callable) -> Callable:
    @wraps(original)
    def type(tensor: Tensor, dtype: Any = None, **kwargs: Any) -> Tensor | str:
        if dtype is None:
            return original(tensor).replace("torch.", "torch.cuda.", 1)
        return original(tensor, dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)

    return type


def _pin_memory(original: Callable) -> Callable:
    @wraps(original)
    def pin_memory(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    return pin_memory


def _context(original: Callable) -> Callable:
    # torch keeps this set, and looks in it for the functions that it sees: those below the replacements.
    _device._device_constructors()

    @wraps(original)
    def context(self: _device.DeviceContext, device: Any) -> None:
        original(self, cpu_for_cuda(device))

    return context


CONSTRUCTORS = """
arange as_tensor asarray empty empty_like empty_permuted empty_strided eye full full_like linspace logspace ones
ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor sparse_coo_tensor tensor
tril_indices triu_indices zeros zeros_like
""".split()
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
WHY = "it makes a CUDA tensor"
FUNCTION, METHOD = "builtin_function_or_method", "method_descriptor"
# Replacements of single functions, since a mode for all of torch's functions takes 1.2 us of each call: a third of the
# time of small models.
PATCHES = (
    Patch(
        "torch.utils._device:DeviceContext.__init__", _context, why="of `with torch.device`", expects="(self, device)"
    ),
    *[Patch(f"torch:{name}", _constructor, why=WHY, expects=FUNCTION) for name in CONSTRUCTORS],
    *[Patch(f"torch:Tensor.{name}", _constructor, why=WHY, expects=METHOD) for name in METHODS],
    Patch("torch:Tensor.to", _to, why=WHY, expects=METHOD),
    Patch("torch:Tensor.cuda", _cuda, why=WHY, expects=METHOD),
    Patch("torch:Tensor.pin_memory", _pin_memory, why="there is no CUDA to pin memory for", expects=METHOD),
    Patch("torch:Tensor.type", _type, why="the trainer compares with names of CUDA's types", expects=METHOD),
)
