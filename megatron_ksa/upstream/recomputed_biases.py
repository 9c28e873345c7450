"""Biases that a recomputed module returns: Megatron's and Transformer Engine's checkpoints make them no parameters.

An MLP with biases returns its last bias beside its rows. Megatron 0.19.2 recomputes it (`--recompute-modules mlp`) in
an autograd function, and autograd writes the function into what it returns: the parameter itself is then its output
and no leaf. In the backward pass the parameter's gradient went to the function once more, which computed the MLP again,
and so on: the run stood still, without an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ksa.upstream.patches import Patch

WHY = "a bias that a recomputed MLP returns is the output of the recompute, whose backward pass never ends"


def without_parameters(function: Callable) -> Callable:
    """`function`, which a checkpoint calls, without parameters among its results where no gradient is recorded.

    The second call, in the backward pass, returns parameters as they are, which get their gradients there.
    """

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        results = function(*args, **options)
        if torch.is_grad_enabled():
            return results
        return tuple(map(_alias, results)) if isinstance(results, tuple) else _alias(results)

    return run


def _alias(result: Any) -> Any:
    return result.detach() if isinstance(result, nn.Parameter) else result


def _forward(original: Callable) -> Callable:
    @wraps(original)
    def forward(ctx: Any, run_function: Callable, distribute_saved_activations: bool, *args: Any) -> Any:
        return original(ctx, without_parameters(run_function), distribute_saved_activations, *args)

    return forward


def _te_checkpoint(original: Callable) -> Callable:
    @wraps(original)
    def te_checkpoint(forward_func: Callable, *args: Any, **options: Any) -> Tensor | tuple[Tensor | None, ...]:
        return original(without_parameters(forward_func), *args, **options)

    return te_checkpoint


PATCHES = (
    Patch(
        "megatron.core.tensor_parallel.random:CheckpointFunction.forward", _forward, why=WHY,
        expects="(ctx, run_function, distribute_saved_activations, *args)",
    ),
    Patch(
        "megatron.core.extensions.transformer_engine:te_checkpoint", _te_checkpoint, why=WHY,
        expects="(forward_func, distribute_saved_activations, get_rng_state_tracker, tp_group, *args, **kwargs)",
    ),
)  # fmt: skip
