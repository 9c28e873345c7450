"""`cuda` devices stand for the CPU: a torch function mode for the device arguments that the trainer passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs = {name: cpu_for_cuda(value) for name, value in kwargs.items()}
    return tensor.to(*(cpu_for_cuda(value) for value in args), **kwargs)


def _cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor.to(CPU)


def _type(tensor: Tensor, dtype: Any = None, **kwargs: Any) -> Tensor | str:
    """Name CPU types as CUDA's, which the trainer compares with, and take CUDA's names as CPU types."""
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    return tensor.type(dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)


def _same(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _gives_gradients(kwargs: dict[str, Any] | None) -> bool:
    """Whether `torch.autograd.backward` got a gradient for every tensor, as activation recompute calls it."""
    gradients = (kwargs or {}).get("grad_tensors")
    return isinstance(gradients, tuple | list) and all(isinstance(grad, Tensor) for grad in gradients)


def _run_backward(
    tensors: tuple, grad_tensors: tuple, retain_graph: bool | None, create_graph: bool, inputs: tuple | None
) -> None:
    torch.autograd.Variable._execution_engine.run_backward(
        tensors, tuple(grad_tensors), bool(retain_graph or create_graph), create_graph, inputs or (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


_METHODS: dict[Callable, Callable] = {Tensor.to: _to, Tensor.cuda: _cuda, Tensor.type: _type, Tensor.pin_memory: _same}


class CudaMeansCpu(TorchFunctionMode):
    """While active in a thread, tensors asked for on `cuda` are made on the CPU, and never pinned.

    The arguments of a torch function are its caller's, so they are handed on as they came.
    """

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.backward and _gives_gradients(kwargs):
            # torch leaves the mode while this function runs, but backward passes ask for `cuda` as well.
            with self:
                return _run_backward(*args, **kwargs)
        method = _METHODS.get(func)
        if method is not None:
            return method(*args, **(kwargs or {}))
        if not kwargs:
            return func(*args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": cpu_for_cuda(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)
