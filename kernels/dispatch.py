"""Which implementation an op takes: Triton kernels on CUDA tensors, plain PyTorch elsewhere and for float64."""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_reference_forced = False


def force_reference(forced: bool = True) -> None:
    """Take plain PyTorch on every device from now on, in place of the Triton kernels (to compare the two)."""
    global _reference_forced
    _reference_forced = forced


@functools.cache
def _announce(op: str, path: str) -> None:
    logger.info("%s runs in %s", op, path)


def uses_triton(op: str, rows: Tensor) -> bool:
    """Whether `op` takes its Triton kernels for `rows`; logs the answer once for each op and path."""
    uses = rows.is_cuda and rows.dtype != torch.float64 and not _reference_forced
    if not torch.compiler.is_compiling():
        _announce(op, "Triton kernels" if uses else f"plain PyTorch ({rows.device.type}, {rows.dtype})")
    return uses
