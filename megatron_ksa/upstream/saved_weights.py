"""Weight gradients that are in their buffer already: how DDP is told, and Megatron's linear layers under hooks.

A layer whose product adds a weight's gradient to `main_grad` itself gives autograd a tensor that DDP's hook receives
and does not add, and marks the weight. Megatron 0.19.2 marks the weight that it saved. Where hooks on saved tensors are
on (`SavedAgain`), what it gets back is a copy without the parameter's attributes, and autograd gets no gradient:
`--overlap-grad-reduce` ended in an assertion. Transformer Engine keeps a reference to the parameter.
"""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from megatron_ksa.upstream.patches import Patch

LINEAR = "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication"
WHY = "a weight that hooks on saved tensors gave back is no parameter"


def in_its_buffer(weight: Tensor) -> Tensor | None:
    """Mark a weight whose gradient is in `main_grad`; what its autograd function returns as the gradient.

    A weight shared with the embedding has `zero_out_wgrad`: there DDP's hook adds what autograd summed, embedding and
    zeros.

    Returns:
        An uninitialised tensor of the weight's shape, zeros where the hook adds it, or None without Megatron's DDP.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


def _forward(original: Callable) -> Callable:
    @wraps(original)
    def forward(ctx: Any, input: Tensor, weight: Tensor, *options: Any) -> Tensor:
        ctx.parameter = weakref.ref(weight)
        return original(ctx, input, weight, *options)

    return forward


def _backward(original: Callable) -> Callable:
    @wraps(original)
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        d_input, d_weight, *others = original(ctx, grad_output)
        weight = ctx.parameter()
        if d_weight is None and ctx.main_grad is not None and weight is not None and weight.requires_grad:
            d_weight = in_its_buffer(weight)
        return d_input, d_weight, *others

    return backward


PATCHES = (
    Patch(
        f"{LINEAR}.forward", _forward, why=WHY,
        expects="(ctx, input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, "
        "grad_output_buffer, wgrad_deferral_limit, tp_group, gtp_remat_size)",
    ),
    Patch(f"{LINEAR}.backward", _backward, why=WHY, expects="(ctx, grad_output)"),
)  # fmt: skip
