"""Clipping, Adam and the copy to 16-bit parameters in one pass, where Megatron steps torch's Adam.

Megatron 0.19.2 clips gradients in a pass of its own (8 bytes of memory traffic a parameter), steps Adam (28) and
copies the parameters to 16 bits (6); one kernel does it in 30. The scale stays on the device: the host does not wait
for the gradients' norm before it launches the step.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_ksa.kernels.adam import AdamTensors, adam_step
from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.upstream.patches import Patch


class OnePass:
    """The steps of one of Megatron's mixed-precision optimizers around torch's Adam.

    The state is torch's, so that checkpoints are those of torch's Adam.

    Attributes:
        scale: factor of the gradients in the next step, from clipping: float32 of one element, or None for 1.
        mains, models: float32 parameters and the 16-bit ones that follow them, by parameter group.
        copies_all: a step writes every parameter of the model.
    """

    def __init__(self, optimizer: MixedPrecisionOptimizer) -> None:
        self.adam = optimizer.optimizer
        self.scale: Tensor | None = None
        # (name of a norm, ids of the parameters with gradients) -> those whose gradients count in the norm.
        self._counted: dict[tuple, list[Tensor]] = {}
        plain = isinstance(optimizer, Float16OptimizerWithFloat16Params)
        self.mains = optimizer.fp32_from_float16_groups if plain else optimizer.shard_fp32_from_float16_groups
        self.models = optimizer.float16_groups if plain else optimizer.shard_float16_groups
        # The distributed optimizer has a copy of each float32 parameter of a mixed model, which `step` does not write.
        self.copies_all = plain or not any(optimizer.shard_fp32_groups)

    @property
    def parameters(self) -> list[Tensor]:
        """Float32, in the order of Adam's groups."""
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]

    def is_ready(self) -> bool:
        """Whether the next step can be this one; not the first, in which torch makes Adam's state."""
        state = self.adam.state
        return (
            fuses("optimizer")
            and not any(group[name] for group in self.adam.param_groups for name in ("capturable", "amsgrad"))
            and all("step" in state.get(parameter, ()) for parameter in self.parameters if parameter.grad is not None)
        )

    def gradients(self, filtered: Callable[[str | None], list[Tensor]], norm: str | None) -> list[Tensor]:
        """The gradients that count in a norm, as Megatron's `get_grads_for_grad_norm` (`filtered`) lists them.

        `filtered` is called once for each set of parameters that have gradients, because what counts does not change.
        """
        parameters = self.parameters
        key = (norm, *[id(parameter) for parameter in parameters if parameter.grad is not None])
        if key not in self._counted:
            found = {id(gradient) for gradient in filtered(norm)}
            self._counted = {key: [parameter for parameter in parameters if id(parameter.grad) in found]}
        return [parameter.grad for parameter in self._counted[key]]

    def clip(self, max_norm: float, total_norm: Tensor | float) -> None:
        """Scale the gradients of the next step so that their norm is at most max_norm."""
        coefficient = max_norm / (total_norm + 1.0e-6)
        if isinstance(coefficient, Tensor):
            self.scale = coefficient.clamp(max=1.0)
        else:
            self.scale = self.parameters[0].new_tensor([coefficient]) if coefficient < 1.0 else None

    def scale_now(self) -> None:
        """Multiply the gradients by `scale` now, for a step of Megatron's, which does not."""
        if self.scale is not None:
            scale_by([parameter.grad for parameter in self.parameters if parameter.grad is not None], self.scale)
            self.scale = None

    @torch.no_grad()
    def step(self) -> None:
        """Scaled gradients, Adam, 16-bit parameters."""
        copies = {
            id(main): model.data
            for groups in zip(self.mains, self.models, strict=True)
            for main, model in zip(*groups, strict=True)
        }
        for group in self.adam.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.adam.state[parameter] for parameter in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            tensors = AdamTensors(
                parameters, [parameter.grad for parameter in parameters], [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [copies.get(id(parameter)) for parameter in parameters],
                steps,
            )  # fmt: skip
            adam_step(
                parameters, tensors, self.scale, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], decoupled=isinstance(self.adam, torch.optim.AdamW),
            )  # fmt: skip
        self.scale = None


_of_optimizer: WeakKeyDictionary[MixedPrecisionOptimizer, OnePass] = WeakKeyDictionary()
_of_parameter = WeakTensorKeyDictionary()


def take_over(optimizer: object) -> None:
    """Make the steps of one of Megatron's optimizers one pass, if `OnePass` knows its kind."""
    if type(optimizer) not in (Float16OptimizerWithFloat16Params, DistributedOptimizer):
        return
    adam, config = optimizer.optimizer, optimizer.config
    if type(adam) not in (torch.optim.Adam, torch.optim.AdamW) or config.use_precision_aware_optimizer:
        return
    if config.reuse_grad_buf_for_mxfp8_param_ag:
        return
    if isinstance(optimizer, DistributedOptimizer):
        ddp = optimizer.ddp_config
        if ddp.use_megatron_fsdp or ddp.fp8_param_gather or ddp.fp4_param_gather:
            return
    one_pass = OnePass(optimizer)
    _of_optimizer[optimizer] = one_pass
    for parameter in one_pass.parameters:
        _of_parameter[parameter] = one_pass


def scale_by(gradients: list[Tensor], coefficient: Tensor) -> None:
    """gradients *= coefficient, a float32 tensor of one element; nothing where it is 1."""
    if gradients and coefficient.item() != 1.0:
        torch._foreach_mul_(gradients, coefficient.view(()))


def scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], coefficient: Tensor
) -> None:  # fmt: skip
    """What Transformer Engine's `multi_tensor_scale_tensor` is to Megatron, which then keeps norms on the device."""
    gradients, _ = tensor_lists
    scale_by(gradients, coefficient)


def _built(build: Callable) -> Callable:
    """Megatron's `get_megatron_optimizer`, its steps in one pass."""

    @wraps(build)
    def get_megatron_optimizer(*args, **kwargs):
        built = build(*args, **kwargs)
        for part in getattr(built, "chained_optimizers", [built]):
            take_over(part)
        return built

    return get_megatron_optimizer


def _clip(original: Callable) -> Callable:
    """`clip_grad_by_total_norm_fp32`, which leaves the clipping to the step where that is one pass."""

    @wraps(original)
    def clip_grad_by_total_norm_fp32(
        parameters: Iterable[Tensor] | Tensor, max_norm: float, total_norm: Tensor | float,
        use_decoupled_grad: bool = False,
    ) -> None:  # fmt: skip
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        one_pass = _of_parameter.get(parameters[0]) if parameters else None
        # A group of parameters that is clipped by a norm of its own is clipped at once.
        if one_pass is not None and len(parameters) == len(one_pass.parameters) and one_pass.is_ready():
            one_pass.clip(max_norm, total_norm)
        else:
            original(parameters, max_norm, total_norm, use_decoupled_grad)

    return clip_grad_by_total_norm_fp32


def _gradients(original: Callable) -> Callable:
    """`MegatronOptimizer.get_grads_for_grad_norm`, which asks every parameter for its groups in every iteration."""

    @wraps(original)
    def get_grads_for_grad_norm(self: MegatronOptimizer, grad_norm_group: str | None = None) -> list[Tensor]:
        one_pass = _of_optimizer.get(self)
        if one_pass is None or not fuses("optimizer"):
            return original(self, grad_norm_group)
        return one_pass.gradients(lambda norm: original(self, norm), grad_norm_group)

    return get_grads_for_grad_norm


def _step(original: Callable) -> Callable:
    """`MixedPrecisionOptimizer.step_with_ready_grads` in one pass."""

    @wraps(original)
    def step_with_ready_grads(self: MixedPrecisionOptimizer) -> bool:
        one_pass = _of_optimizer.get(self)
        if one_pass is None:
            return original(self)
        if not one_pass.is_ready():
            one_pass.scale_now()
            return original(self)
        one_pass.step()
        if not one_pass.copies_all:
            self._copy_main_params_to_model_params()
        return True

    return step_with_ready_grads


CLIP = "(parameters, max_norm, total_norm, use_decoupled_grad=False)"
OPTIMIZER = "megatron.core.optimizer"
PATCHES = (
    Patch(
        "megatron.training.training:get_megatron_optimizer",
        _built,
        why="clipping, Adam and the 16-bit copy are three passes over memory",
        expects="(config, model_chunks, config_overrides=None, use_gloo_process_groups=True, pg_collection=None, "
        "dump_param_to_param_group_map=None)",
    ),
    Patch(
        f"{OPTIMIZER}.clip_grads:multi_tensor_scale_tensor_impl",
        lambda original: scale_tensor,
        why="without it Megatron waits for the gradients' norm",
        expects="NoneType",
    ),
    Patch(
        f"{OPTIMIZER}.optimizer:clip_grad_by_total_norm_fp32",
        _clip,
        why="clipping is a pass of its own over the gradients",
        expects=CLIP,
    ),
    Patch(
        f"{OPTIMIZER}.optimizer:MegatronOptimizer.get_grads_for_grad_norm",
        _gradients,
        why="the device waits while the host asks every parameter whether its gradient counts",
        expects="(self, grad_norm_group=None)",
    ),
    Patch(
        f"{OPTIMIZER}.optimizer:MixedPrecisionOptimizer.step_with_ready_grads",
        _step,
        why="Adam and the 16-bit copy are two passes over the parameters",
        expects="(self)",
    ),
)


def patches() -> tuple[Patch, ...]:
    """Patches that make steps one pass; none where a fused optimizer of another library is installed."""
    return PATCHES if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm else ()
