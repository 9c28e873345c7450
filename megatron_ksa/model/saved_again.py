"""Tensors that a layer would save and that are computed again instead, each by the one kernel that made it.

Megatron recomputes whole layers or modules with their products. What is recomputed here takes memory traffic alone:
the outputs of norms, rotated heads and the MLP's activation are functions of tensors that autograd keeps in any case.
torch's hooks on saved tensors put a placeholder there, and compute the tensor when the backward pass asks for it: same
kernel, same input, so the same bits.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import mlp as megatrons
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from megatron_ksa.config.recompute import CHEAP

Compute = Callable[[], tuple[Tensor, ...]]


class _Results:
    """Results of one kernel, computed when the first of them is asked for and dropped with the last."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        # Placeholders of the results, and those that the backward pass has not asked for yet.
        self.placeholders = self.open = 0
        self.tensors: tuple[Tensor, ...] | None = None

    def take(self, index: int) -> Tensor:
        if self.tensors is None:
            with torch.no_grad():
                self.tensors = self.compute()
            self.open = self.placeholders
        tensor = self.tensors[index]
        self.open -= 1
        if self.open <= 0:
            self.tensors = None
        return tensor


@dataclass(frozen=True)
class _Placeholder:
    """What stands for a view of a result among autograd's saved tensors."""

    results: _Results
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedAgain:
    """Lets one layer keep placeholders of what `offer` was given in its forward pass.

    Args:
        layer: a dense layer of this project.
        modules: of `CHEAP`: norms, heads, activation.
    """

    def __init__(self, layer: TransformerLayer, modules: tuple[str, ...]) -> None:
        # Storage -> its results and place there, and the tensor itself, so that no other takes its address meanwhile.
        self._offered: dict[int, tuple[_Results, int, Tensor]] = {}
        self._hooks: saved_tensors_hooks | None = None
        handles = [
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave, always_call=True),
        ]
        if "norms" in modules:
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                handles.append(norm.register_forward_hook(self._after_norm))
        if "activation" in modules:
            handles += self._watch_mlp(layer.mlp)
        if "heads" in modules:
            # The attention is no owner of this object: copies of the model do not hold another model's layers.
            layer.self_attention.offer = weakref.WeakMethod(self.offer)
        self._attention = layer.self_attention
        self._handles: list[RemovableHandle] = handles

    def remove(self) -> None:
        """Let the layer save everything again."""
        for handle in self._handles:
            handle.remove()
        self._attention.offer = None

    def offer(self, tensors: tuple[Tensor, ...], compute: Compute) -> None:
        """Take note that `compute` returns equal tensors, from inputs that the backward pass keeps anyway."""
        if self._hooks is None:
            return
        results = _Results(compute)
        for index, tensor in enumerate(tensors):
            self._offered[tensor.untyped_storage()._cdata] = results, index, tensor

    def _enter(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._hooks = saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()

    def _leave(self, *_: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
        self._hooks = None
        self._offered.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Placeholder:
        results, index, _ = self._offered.get(tensor.untyped_storage()._cdata, (None, 0, None))
        if results is None:
            return tensor
        results.placeholders += 1
        return _Placeholder(results, index, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _after_norm(self, norm: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        rows = args[0]
        if rows is None:
            return
        first = out[0] if isinstance(out, tuple) else out
        kept = rows.detach()

        def compute() -> tuple[Tensor, ...]:
            again = norm.forward(kept)
            return (again[0] if isinstance(again, tuple) else again,)

        self.offer((first,), compute)

    def _watch_mlp(self, mlp: MLP) -> list[RemovableHandle]:
        projected: list[tuple[Tensor, Tensor | None]] = []

        def after_first(_: nn.Module, args: tuple, out: tuple[Tensor, Tensor | None]) -> None:
            projected[:] = [out]

        def before_second(_: nn.Module, args: tuple) -> None:
            rows, bias = projected.pop()
            kept = rows.detach()
            self.offer((args[0],), lambda: (activate(mlp, kept, bias),))

        return [
            mlp.linear_fc1.register_forward_hook(after_first),
            mlp.linear_fc2.register_forward_pre_hook(before_second),
        ]


def _unpack(saved: Tensor | _Placeholder) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.results.take(saved.index).as_strided(saved.shape, saved.stride, saved.offset)


def can_recompute(layer: TransformerLayer) -> tuple[str, ...]:
    """Which of `CHEAP` a layer's kind allows.

    Rotated heads need a norm in the rotation's kernel, which is what keeps the projection; the activation must be one
    that `activate` computes, before a projection of Megatron's own; norms must be modules of their own.
    """
    mlp, config = layer.mlp, layer.config
    # Whether Transformer Engine's projection saves its input as it is was not looked at.
    plain = type(mlp) is MLP and config.activation_func_clamp_value is None and config.transformer_impl == "local"
    norms = layer.input_layernorm, layer.pre_mlp_layernorm
    fits = {
        "norms": all(next(norm.parameters(), None) is not None for norm in norms),
        "heads": layer.self_attention.q_layernorm is not None,
        "activation": plain and config.gated_linear_unit and config.activation_func is nn.functional.silu,
    }
    return tuple(name for name in CHEAP if fits[name])


def activate(mlp: MLP, rows: Tensor, bias: Tensor | None) -> Tensor:
    """The result of SwiGLU in Megatron's MLP, by the kernel that it takes.

    Args:
        rows: result of the first projection, [rows, batch, 2 * ffn].
        bias: [2 * ffn] or None.
    """
    config = mlp.config
    if config.bias_activation_fusion:
        # As the MLP finds it: this project's kernel may stand there (megatron_ksa/upstream/activation.py).
        return megatrons.bias_swiglu_impl(rows, bias, config.activation_func_fp8_input_store, False)
    gate, linear = (rows if bias is None else rows + bias).chunk(2, dim=-1)
    return config.activation_func(gate) * (linear + config.glu_linear_offset)
