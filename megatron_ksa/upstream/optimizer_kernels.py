"""Multi-tensor kernels of torch where neither Transformer Engine nor NVIDIA's apex is installed.

Megatron 0.19.2 then steps Adam tensor list after tensor list with temporaries, takes the gradient norm with one
synchronisation for each parameter, and scales and copies through a temporary for each tensor. torch has one kernel for
each of these: a fused Adam (28 bytes of memory traffic a parameter instead of about 80), `_foreach_norm`,
`_foreach_mul_` and `_foreach_copy_`.
"""

from collections.abc import Callable
from functools import wraps

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_ksa.kernels import adam
from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.upstream.patches import Patch


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool) -> tuple:
    """Megatron's `local_multi_tensor_l2_norm` without waiting for the device: float32 [1] on it, and None."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    wide = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    norm = adam.l2_norm if wide and fuses("optimizer") else adam.reference.l2_norm
    return norm(tensors), None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Megatron's `local_multi_tensor_scale`: second list = factor * first list."""
    source, target = tensor_lists
    if not source:
        return
    if any(a is not b for a, b in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    if factor != 1.0:
        torch._foreach_mul_(target, factor)


def fuse(optimizer: torch.optim.Optimizer | None) -> None:
    """Let torch's Adam step in one kernel where its parameters are on a GPU, after a checkpoint is loaded as well.

    A checkpoint brings the choice of the machine that wrote it, and a step count on that machine's device.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        return
    _choose_kernel(optimizer)
    optimizer.register_load_state_dict_post_hook(_choose_kernel)


def _choose_kernel(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        on_gpu = bool(group["params"]) and all(parameter.is_cuda for parameter in group["params"])
        if group["capturable"]:
            continue
        group["fused"], group["foreach"] = on_gpu or None, None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if on_gpu else "cpu")


def _fused(build: Callable) -> Callable:
    """Megatron's `get_megatron_optimizer`, with torch's fused Adam."""

    @wraps(build)
    def get_megatron_optimizer(*args, **kwargs):
        built = build(*args, **kwargs)
        for part in getattr(built, "chained_optimizers", [built]):
            fuse(getattr(part, "optimizer", None))
        return built

    return get_megatron_optimizer


PATCHES = (
    Patch(
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        lambda original: l2_norm,
        why="the gradient norm waits for the device once a parameter",
        expects="(chunk_size, noop_flag, tensor_lists, per_tensor, *args)",
    ),
    Patch(
        "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
        lambda original: scale,
        why="clipping goes through a temporary a tensor",
        expects="(chunk_size, noop_flag, tensor_lists, scale)",
    ),
    Patch(
        "megatron.core.optimizer.optimizer:multi_tensor_scale_impl",
        lambda original: scale,
        why="copies between 16-bit and float32 parameters go through a temporary a tensor",
        expects="(chunk_size, noop_flag, tensor_lists, scale)",
    ),
    Patch(
        "megatron.training.training:get_megatron_optimizer",
        _fused,
        why="torch's Adam steps tensor list after tensor list with temporaries",
        expects="(config, model_chunks, config_overrides=None, use_gloo_process_groups=True, pg_collection=None, "
        "dump_param_to_param_group_map=None)",
    ),
)


def patches() -> tuple[Patch, ...]:
    """Patches that make the trainer use torch's kernels; none where a fused optimizer is installed."""
    return PATCHES if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm else ()
