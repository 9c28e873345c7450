"""A step of Adam in plain PyTorch: what the Triton kernel is compared with.

With the gradient g times the scale of clipping, step count t, and p the parameter:

    g = g + weight_decay p              (not decoupled)        p = p - lr weight_decay p       (decoupled)
    m = beta_1 m + (1 - beta_1) g                              v = beta_2 v + (1 - beta_2) g^2
    p = p - lr / (1 - beta_1^t) m / (sqrt(v) / sqrt(1 - beta_2^t) + eps)

in the order of torch's loop over tensors; the copy is p rounded to its dtype.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamTensors(NamedTuple):
    """Tensors of each parameter, in the same order.

    Attributes:
        parameters, gradients, means, squares: float32, contiguous; parameter, g, m and v above.
        copies: 16 bits, contiguous, of the parameter's size, or None where there is none.
        steps: float32 [], t, counted up already; on the parameter's device.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    copies: list[Tensor | None]
    steps: list[Tensor]


def adam_step(
    parameters: list[Tensor],
    tensors: AdamTensors,
    scale: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Change parameters, means, squares and copies in place.

    Args:
        parameters: `tensors.parameters`, of which the first one's device decides between Triton and this function.
        tensors: of all parameters.
        scale: float32 [] on the parameters' device, which multiplies the gradients where they are read (they keep their
            values); None for 1.
        lr, betas, eps, weight_decay: lr, (beta_1, beta_2), eps and weight_decay of the formula.
        decoupled: weight decay as in AdamW.
    """
    beta_1, beta_2 = betas
    for parameter, gradient, mean, square, copy, step in zip(*tensors, strict=True):
        t = step.item()
        if scale is not None:
            gradient = gradient * scale
        if decoupled:
            parameter.mul_(1 - lr * weight_decay)
        elif weight_decay:
            gradient = gradient.add(parameter, alpha=weight_decay)
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        root = (square.sqrt() / math.sqrt(1 - beta_2**t)).add_(eps)
        parameter.addcdiv_(mean, root, value=-lr / (1 - beta_1**t))
        if copy is not None:
            copy.copy_(parameter.view_as(copy))


def l2_norm(tensors: list[Tensor]) -> Tensor:
    """Square root of the sum of all squares.

    Args:
        tensors: float32, at least one.

    Returns:
        Float32 [1].
    """
    norms = [norm.float() for norm in torch._foreach_norm(tensors)]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1)
