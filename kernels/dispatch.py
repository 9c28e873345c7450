"""Which implementation an op takes: Triton kernels on CUDA tensors, plain PyTorch elsewhere and for float64."""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_ksa.kernels.unchecked import is_taken

logger = logging.getLogger(__name__)
_reference_forced = False
# Fusions (`FUSIONS` in megatron_ksa/config/kernels.py) that are taken apart again.
_apart: frozenset[str] = frozenset()


def take_apart(names: Iterable[str]) -> None:
    """From now on, do what these fusions join one after the other, and every other fusion in one pass."""
    global _apart
    _apart = frozenset(names)


def fuses(name: str) -> bool:
    """Whether a fusion is on: not taken apart, not with the reference forced, not unchecked on a machine with a GPU."""
    return name not in _apart and not _reference_forced and (is_taken(name) or not torch.cuda.is_available())


def force_reference(forced: bool = True) -> None:
    """Take plain PyTorch on every device from now on, in place of the Triton kernels (to compare the two)."""
    global _reference_forced
    _reference_forced = forced


@functools.cache
def _announce(op: str, path: str) -> None:
    logger.info("%s runs in %s", op, path)


def uses_triton(op: str, rows: Tensor) -> bool:
    """Whether `op` takes its Triton kernels for `rows`; logs the answer once for each op and path."""
    uses = rows.is_cuda and rows.dtype != torch.float64 and not _reference_forced and is_taken(op)
    if not torch.compiler.is_compiling():
        _announce(op, "Triton kernels" if uses else f"plain PyTorch ({rows.device.type}, {rows.dtype})")
    return uses


# torch.compile would trace the import of a module.
@torch.compiler.assume_constant_result
def _implementation(path: str) -> Callable:
    """The function at "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def by_device[**P, R](op: str, kernels: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of an op's reference: Triton kernels where `uses_triton` says so, else the reference.

    The first argument, a tensor or a list of tensors, decides. Triton is first imported when it is needed.

    Args:
        op: what the log and `unchecked.OPS` call the op.
        kernels: the function that takes the same arguments on a GPU, as "module:function".
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        first = next(iter(inspect.signature(reference).parameters))

        @functools.wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            rows = args[0] if args else kwargs[first]
            uses = uses_triton(op, rows if isinstance(rows, Tensor) else rows[0])
            return (_implementation(kernels) if uses else reference)(*args, **kwargs)

        run.__doc__ = (
            f"{inspect.getdoc(reference)}\n\nTriton kernels on a GPU (`{kernels}`), where an input that they do not "
            "take raises UsageError;\nplain PyTorch elsewhere and for float64.\n"
        )
        return run

    return decorate
