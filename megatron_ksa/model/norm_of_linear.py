"""A norm in a module of its own whose parameter belongs to the projection behind it.

Transformer Engine's LayerNormLinear runs its norm and its product one after the other in 16 bits, so that the norm can
as well be this project's, whose backward kernel adds the residual connection's gradient. Its parameter keeps the name
and the place that it has in the fused module: distributed optimizers store their state by the order of parameters, and
a run in FP8, whose layers are fused, goes on from a checkpoint of 16 bits and the other way round.
"""

import functools
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ksa.model.norm import Norm, ResidualNorm

NAME = "layer_norm_weight"


class NormOfLinear(ResidualNorm):
    """`ResidualNorm` (RMSNorm) with the parameter of a projection, which `of` names; it has none itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.weight

    def of(self, linear: nn.Module) -> None:
        """Take the parameter of `linear`, of a class that `holding_norm` made."""
        # No submodule, whose parameters would have a second name.
        self.__dict__["linear"] = linear

    def forward(self, x: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        # A plain attribute is what the norm finds. Sharded data parallelism replaces parameters, and waits for gathered
        # ones in hooks of the module that holds them: each pass asks by a call.
        self.__dict__["weight"] = self.linear(None)
        return super().forward(x)


@functools.cache
def holding_norm(linear: type[nn.Module]) -> type[nn.Module]:
    """The class of column-parallel projections `linear` that also hold the parameter of the norm before them."""

    class NormHoldingLinear(linear):
        """A projection of normalised rows; a call with None returns the norm's parameter."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            own = dict(self._parameters)
            self._parameters.clear()
            # First, as in the fused module.
            self.register_parameter(NAME, Norm(config, input_size, config.layernorm_epsilon).weight)
            self._parameters.update(own)

        def forward(self, x: Tensor | None, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor | None]:
            return getattr(self, NAME) if x is None else super().forward(x, *args, **options)

    NormHoldingLinear.__name__ = NormHoldingLinear.__qualname__ = f"NormHolding{linear.__name__}"
    return NormHoldingLinear


class DecoderLayer(TransformerLayer):
    """Megatron's layer, whose norms may have the parameters of the projections behind them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if isinstance(self.input_layernorm, NormOfLinear):
            self.input_layernorm.of(self.self_attention.linear_qkv)
        if isinstance(self.pre_mlp_layernorm, NormOfLinear):
            self.pre_mlp_layernorm.of(self.mlp.linear_fc1)
