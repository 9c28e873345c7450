"""Custom ops with a backward op: what torch.compile sees, and the shorter way that eager mode takes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, torch.nn.Parameter)


def differentiable(
    name: str, forward: Callable, backward: Callable, *, fake: Callable, fake_backward: Callable, save: Callable,
    gradients: Callable,
) -> Callable:  # fmt: skip
    """Register `megatron_ksa::name` and `megatron_ksa::name_backward`, and return a differentiable function.

    torch.compile, fake tensors and everything else that traces get the ops. torch.library's wrappers around an op cost
    the host as much as several launches, so that plain tensors in eager mode go to `forward` and `backward` directly.

    Args:
        forward, backward: implementations, annotated as `torch.library.custom_op` wants them; they return new tensors.
        fake, fake_backward: outputs of both without computing them.
        save: `(ctx, inputs, output)`, keeps what the backward pass needs.
        gradients: `(ctx, backward, *gradients of the outputs)`, the gradients of all inputs by way of `backward`.

    Returns:
        `forward`'s function, with the same positional arguments.
    """
    op = torch.library.custom_op(f"megatron_ksa::{name}", forward, mutates_args=())
    op.register_fake(fake)
    backward_op = torch.library.custom_op(f"megatron_ksa::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    op.register_autograd(lambda ctx, *d_outputs: gradients(ctx, backward_op, *d_outputs), setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *d_outputs):
            return gradients(ctx, backward, *d_outputs)

    Eager.__name__ = name

    def run(*inputs):
        if torch.compiler.is_compiling() or type(inputs[0]) not in PLAIN:
            return op(*inputs)
        return Eager.apply(*inputs)

    return run
