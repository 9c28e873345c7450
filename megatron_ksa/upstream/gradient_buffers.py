"""Gradient buffers that an iteration's first product overwrites are not zeroed before it.

Megatron 0.19.2 writes zeros to every gradient at the beginning of an iteration, and the first micro-batch's products
read them: 8 bytes a parameter (docs/results.md, "The parts of a step"). A buffer to which no product was ever added is
zeroed as before. A buffer that misses its product in an iteration (of an expert without tokens) is zeroed when the
gradients are reduced.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.kernels.weight_gradient import unwritten
from megatron_ksa.upstream.patches import Patch

WHY = "gradients that the first product overwrites are zeroed before it"
BUFFER = "megatron.core.distributed.param_and_grad_buffer"


def _reset(original: Callable) -> Callable:
    """`_ParamAndGradBuffer.reset`: zeros where no product will be written."""

    @wraps(original)
    def reset(self: Any) -> None:
        unwritten.own([param.main_grad for param in self.params])
        if not fuses("gradients") or self.extra_main_grads:
            original(self)
            return
        rest = [param.main_grad for param in self.params if not unwritten.mark(param.main_grad)]
        if rest:
            torch._foreach_zero_(rest)

    return reset


def _start_grad_sync(original: Callable) -> Callable:
    """`_ParamAndGradBucketGroup.start_grad_sync`: it reads the gradients of all its parameters."""

    @wraps(original)
    def start_grad_sync(self: Any, force_all_reduce: bool | None = False) -> None:
        for bucket in self.buckets if unwritten else ():
            for param in bucket.params_list:
                unwritten.fill(param.main_grad)
        original(self, force_all_reduce)

    return start_grad_sync


def _backward_post_hook(original: Callable) -> Callable:
    """`DistributedDataParallel._make_backward_post_hook`: it adds gradients that autograd formed."""

    @wraps(original)
    def make(self: Any, param: torch.nn.Parameter) -> Callable:
        hook = original(self, param)

        def fill_first(*unused: Tensor) -> None:
            if param.grad is not None and hasattr(param, "main_grad") and not param.grad_added_to_main_grad:
                unwritten.fill(param.main_grad)
            hook(*unused)

        return fill_first

    return make


PATCHES = (
    Patch(f"{BUFFER}:_ParamAndGradBuffer.reset", _reset, why=WHY, expects="(self)"),
    Patch(
        f"{BUFFER}:_ParamAndGradBucketGroup.start_grad_sync", _start_grad_sync, why=WHY,
        expects="(self, force_all_reduce=False)",
    ),
    Patch(
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
        _backward_post_hook, why=WHY, expects="(self, param)",
    ),
)  # fmt: skip
