"""Clipping, Adam and the copy to 16-bit parameters in one pass, where Megatron steps an Adam of float32 state.

Megatron 0.19.2 clips gradients in a pass of its own (8 bytes of memory traffic a parameter), steps Adam (28) and
copies the parameters to 16 bits (6); one kernel does it in 30. The scale stays on the device: the host does not wait
for the gradients' norm before it launches the step. The Adam is torch's, or where Transformer Engine or NVIDIA's apex
is installed, the `FusedAdam` that Megatron takes from there.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from megatron.core import optimizer as megatrons
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_ksa.kernels.adam import AdamTensors, adam_step
from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.upstream.patches import Patch


class OnePass:
    """The steps of one of Megatron's mixed-precision optimizers around an Adam.

    The state is that Adam's own, so that its checkpoints stay what they are: torch's counts steps in a tensor for each
    parameter, `FusedAdam` in a Python number for each group.

    Attributes:
        scale: factor of the gradients in the next step, from clipping: float32 of one element, or None for 1.
        mains, models: float32 parameters and the 16-bit ones that follow them, by parameter group.
        copies_all: a step writes every parameter of the model.
    """

    def __init__(self, optimizer: MixedPrecisionOptimizer) -> None:
        self.adam = optimizer.optimizer
        self.counts_by_group = is_fused_adam(self.adam)
        # Step counts of groups as the kernel reads them, float32 []: by group.
        self._device_counts: dict[int, Tensor] = {}
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

    @property
    def decoupled(self) -> bool:
        """Weight decay as in AdamW."""
        return bool(self.adam.adam_w_mode) if self.counts_by_group else isinstance(self.adam, torch.optim.AdamW)

    def is_ready(self) -> bool:
        """Whether the next step can be this one; not the first, in which Adam makes its state."""
        if not fuses("optimizer"):
            return False
        groups, state = self.adam.param_groups, self.adam.state
        if self.counts_by_group:
            # A step on the device is that of a `capturable` Adam.
            counted = [group for group in groups if group["params"]]
            fits = all(group["bias_correction"] and isinstance(group.get("step"), int) for group in counted)
            made = "exp_avg"
        else:
            fits = not any(group[name] for group in groups for name in ("capturable", "amsgrad"))
            made = "step"
        return fits and all(made in state.get(p, ()) for p in self.parameters if p.grad is not None)

    def _count(self, i_group: int, parameters: list[Tensor]) -> list[Tensor]:
        """Count a step of a group.

        Returns:
            The count for each of `parameters`, float32 [].
        """
        if not self.counts_by_group:
            counts = [self.adam.state[parameter]["step"] for parameter in parameters]
            if counts:
                torch._foreach_add_(counts, 1)
            return counts
        group = self.adam.param_groups[i_group]
        # A group without parameters on this rank may have no count: whether it gets one differs between versions.
        if "step" in group:
            group["step"] += 1
        if not parameters:
            return []
        if i_group not in self._device_counts:
            self._device_counts[i_group] = torch.empty((), dtype=torch.float32, device=parameters[0].device)
        # A fill is launched with the number: the host does not wait.
        return [self._device_counts[i_group].fill_(group["step"])] * len(parameters)

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
        for i_group, group in enumerate(self.adam.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            steps = self._count(i_group, parameters)
            if not parameters:
                continue
            states = [self.adam.state[parameter] for parameter in parameters]
            tensors = AdamTensors(
                parameters, [parameter.grad for parameter in parameters], [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [copies.get(id(parameter)) for parameter in parameters],
                steps,
            )  # fmt: skip
            adam_step(
                parameters, tensors, self.scale, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], decoupled=self.decoupled,
            )  # fmt: skip
        self.scale = None


_of_optimizer: WeakKeyDictionary[MixedPrecisionOptimizer, OnePass] = WeakKeyDictionary()
_of_parameter = WeakTensorKeyDictionary()


TORCHS = (torch.optim.Adam, torch.optim.AdamW)
# Attributes of a `FusedAdam` with which it keeps or reads other tensors than float32 state and gradients.
OTHER_TENSORS = ("capturable", "master_weights", "use_decoupled_grad", "store_param_remainders")


def is_fused_adam(adam: object) -> bool:
    """Whether it is the `FusedAdam` of Transformer Engine or apex, from where Megatron takes it."""
    fused = megatrons.Adam
    return fused not in TORCHS and type(adam) is fused


def _has_float32_state(adam: object) -> bool:
    """Whether it is an Adam whose state the kernel takes, counted as `OnePass` counts."""
    if type(adam) in TORCHS:
        return True
    if not is_fused_adam(adam) or any(getattr(adam, name, False) for name in OTHER_TENSORS):
        return False
    return all(getattr(adam, f"{name}_dtype", torch.float32) == torch.float32 for name in ("exp_avg", "exp_avg_sq"))


def take_over(optimizer: object) -> None:
    """Make the steps of one of Megatron's optimizers one pass, if `OnePass` knows its kind."""
    if type(optimizer) not in (Float16OptimizerWithFloat16Params, DistributedOptimizer):
        return
    adam, config = optimizer.optimizer, optimizer.config
    if not _has_float32_state(adam) or config.use_precision_aware_optimizer:
        return
    if config.reuse_grad_buf_for_mxfp8_param_ag:
        return
    if isinstance(optimizer, DistributedOptimizer):
        ddp = optimizer.ddp_config
        if ddp.use_megatron_fsdp or ddp.fp8_param_gather or ddp.fp4_param_gather:
            return
    one_pass = OnePass(optimizer)
    # Parameters that are kept in 8 bits are a class of their own, which the kernel cannot write.
    if any(type(model) not in (Tensor, nn.Parameter) for group in one_pass.models for model in group):
        return
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
SCALE = Patch(
    f"{OPTIMIZER}.clip_grads:multi_tensor_scale_tensor_impl",
    lambda original: scale_tensor,
    why="without it Megatron waits for the gradients' norm",
    expects="NoneType",
)
PATCHES = (
    Patch(
        "megatron.training.training:get_megatron_optimizer",
        _built,
        why="clipping, Adam and the 16-bit copy are three passes over memory",
        expects="(config, model_chunks, config_overrides=None, use_gloo_process_groups=True, pg_collection=None, "
        "dump_param_to_param_group_map=None)",
    ),
    SCALE,
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
    """Patches that make steps one pass; Transformer Engine's way to scale by a number on the device stays."""
    return tuple(patch for patch in PATCHES if patch is not SCALE or clip_grads.multi_tensor_scale_tensor_impl is None)
