"""Resume of Megatron's distributed optimizer (`--use-distributed-optimizer`) with torch's Adam.

Megatron 0.19.2 is written for fused Adams, which count steps once for a parameter group. torch's Adam, the optimizer
wherever neither Transformer Engine nor NVIDIA's apex is installed, keeps a step tensor for each parameter, and
`DistributedOptimizer` treats it wrongly: it reads steps that do not exist before the first iteration, copies into
parameters that require gradients, overwrites the saved step with the fresh optimizer's (or looks for it in vain), and
lets all parameters share one tensor, which Adam then advances once for each of them. The last two go unnoticed:
training goes on with the wrong bias correction.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_ksa.upstream.patches import Patch


def _uses_torch_adam(optimizer: DistributedOptimizer) -> bool:
    return not optimizer.ddp_config.use_megatron_fsdp and isinstance(
        optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW
    )


def _allocate_state(optimizer: DistributedOptimizer) -> None:
    """Give each parameter the state that Adam makes at its first step, so that there is something to save or load."""
    adam = optimizer.optimizer
    for group in adam.param_groups:
        on_device = group["capturable"] or group["fused"]
        for param in group["params"]:
            if "step" not in adam.state[param]:
                step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
                moments = {key: torch.zeros_like(param) for key in optimizer.optimizer_state_keys}
                adam.state[param].update({"step": step, **moments})


def _state_dict(original: Callable) -> Callable:
    """`DistributedOptimizer.state_dict`, also before the first step."""

    @wraps(original)
    def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
        if _uses_torch_adam(self):
            _allocate_state(self)
        return original(self)

    return state_dict


def _load_state_dict(original: Callable) -> Callable:
    """`DistributedOptimizer.load_state_dict`, leaving every parameter with a step of its own."""

    @wraps(original)
    def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        if not _uses_torch_adam(self):
            original(self, state_dict)
            return
        _allocate_state(self)
        with torch.no_grad():
            original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return load_state_dict


def _set_states(original: Callable) -> Callable:
    """Set a parameter and its moments, but not its step: `load_state_dict` has it from the checkpoint's groups."""

    @wraps(original)
    def set_states(self: DistributedOptimizer, model_param: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        if _uses_torch_adam(self):
            tensors = {**tensors, "step": None}
        original(self, model_param, tensors)

    return set_states


OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
PATCHES = (
    Patch(
        f"{OPTIMIZER}.state_dict",
        _state_dict,
        why="it reads the steps of torch's Adam before the first iteration has made them",
        expects="(self)",
    ),
    Patch(
        f"{OPTIMIZER}.load_state_dict",
        _load_state_dict,
        why="all parameters of torch's Adam share one step after a resume",
        expects="(self, state_dict)",
    ),
    Patch(
        f"{OPTIMIZER}._set_main_param_and_optimizer_states",
        _set_states,
        why="the saved step of torch's Adam is overwritten with the fresh optimizer's",
        expects="(self, model_param, tensors)",
    ),
)


def patches() -> tuple[Patch, ...]:
    """Patches that make a run resumed with the distributed optimizer equal to an uninterrupted one.

    None where a fused Adam is installed, which Megatron handles itself.
    """
    return () if distrib_optimizer.HAVE_APEX_OR_TE else PATCHES
