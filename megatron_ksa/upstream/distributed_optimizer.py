"""Resume of Megatron's distributed optimizer (`--use-distributed-optimizer`) with torch's Adam.

Megatron 0.19.2 is written for fused Adams, which count steps once for a parameter group. torch's Adam, the optimizer
wherever neither Transformer Engine nor NVIDIA's apex is installed, keeps a step tensor for each parameter, and
`DistributedOptimizer` treats it wrongly: it reads steps that do not exist before the first iteration, copies into
parameters that require gradients, overwrites the saved step with the fresh optimizer's (or looks for it in vain), and
lets all parameters share one tensor, which Adam then advances once for each of them. The last two go unnoticed:
training goes on with the wrong bias correction.
"""

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

_original = {
    "state_dict": DistributedOptimizer.state_dict,
    "load_state_dict": DistributedOptimizer.load_state_dict,
    "set_states": DistributedOptimizer._set_main_param_and_optimizer_states,
}


def install_resume_fix() -> bool:
    """Make a run resumed with the distributed optimizer equal to an uninterrupted one; may be called repeatedly.

    Returns:
        Whether the fix is in place; False where a fused Adam is installed, which Megatron handles itself.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    DistributedOptimizer.state_dict = _state_dict
    DistributedOptimizer.load_state_dict = _load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states
    return True


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


def _state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    """`DistributedOptimizer.state_dict`, also before the first step."""
    if _uses_torch_adam(self):
        _allocate_state(self)
    return _original["state_dict"](self)


def _load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """`DistributedOptimizer.load_state_dict`, leaving every parameter with a step of its own."""
    if not _uses_torch_adam(self):
        _original["load_state_dict"](self, state_dict)
        return
    _allocate_state(self)
    with torch.no_grad():
        _original["load_state_dict"](self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _set_states(self: DistributedOptimizer, model_param: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """Set a parameter and its moments, but not its step: `load_state_dict` has it from the checkpoint's groups."""
    if _uses_torch_adam(self):
        tensors = {**tensors, "step": None}
    _original["set_states"](self, model_param, tensors)
