"""LayerNorm and RMSNorm for Megatron's local specs that support sequence parallelism and zero-centred weights."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.dispatch import fuses, uses_triton
from megatron_ksa.kernels.norm import OP, rms_norm
from megatron_ksa.upstream.layer_graphs import kept_by_graphs

# Sizes of rows that the fused kernel takes: smaller rows are heads, larger ones do not fit a program's registers.
FUSED_SIZES = range(512, 16385)


def fits_kernel(config: TransformerConfig, size: int) -> bool:
    """Whether norms of rows of this size run in the fused kernel on a GPU."""
    return config.normalization == "RMSNorm" and size in FUSED_SIZES and fuses("norm")


class Norm(nn.Module):
    """Normalisation over the last dimension, as `config.normalization` says.

    LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * g + b. RMSNorm: y = x / sqrt(mean(x^2) + eps) * g.
    g is `weight`, or 1 + `weight` with `config.layernorm_zero_centered_gamma`.

    The parameters have the names, shapes and values of `torch.nn.LayerNorm` and `torch.nn.RMSNorm`; Megatron's own
    torch norm refuses sequence parallelism, here the parameters are marked for its gradient reduction instead.

    Args:
        config: Megatron's transformer configuration.
        hidden_size: size of the last dimension.
        eps: added to the variance or mean square.
        persist_layer_norm: has no meaning here, torch's kernels are always used; in Megatron's norm signature.
        zero_centered_gamma: has no meaning here, `config` decides; in Megatron's norm signature.
        normalization: has no meaning here, `config` decides; in Megatron's norm signature.

    Raises:
        UsageError: a normalisation that is neither of the two.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise UsageError(
                f"normalization {config.normalization!r} has no local implementation: use --normalization LayerNorm or "
                "RMSNorm"
            )
        self.config = config
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.is_rms = config.normalization == "RMSNorm"
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.is_rms else nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.reset_parameters()
        for parameter in self.parameters():
            # Each rank sees its rows only: Megatron sums these gradients over the tensor-parallel group.
            parameter.sequence_parallel = config.sequence_parallel

    def reset_parameters(self) -> None:
        """Start as plain normalisation: g is 1 and b is 0."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | None) -> Tensor:
        """Normalise rows.

        Args:
            x: [..., hidden_size], float32, bfloat16 or float16. None asks for the weight alone, for a kernel that
                normalises itself: Megatron's hooks, which wait for gathered parameters, run on calls of a module.

        Returns:
            The same shape and dtype; sums are float32.
        """
        if x is None:
            return self.weight
        if self._fuses(x):
            return rms_norm(x, self.weight, self.eps, self.zero_centered)[0]
        x = kept_by_graphs(x, self.config)
        # 1 + g loses the weight's low bits in 16 bits, so that the sum and the product are float32.
        weight = self.weight.float() + 1.0 if self.zero_centered else self.weight
        shape = (self.hidden_size,)
        if weight.dtype == x.dtype:
            return self._normalize(x, shape, weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return self._normalize(x.float(), shape, weight.float(), bias).to(x.dtype)

    def _fuses(self, x: Tensor) -> bool:
        """Whether the backward pass reads rows once, in this project's kernel."""
        fits = fits_kernel(self.config, self.hidden_size) and x.dtype != torch.float64
        return fits and not torch.compiler.is_compiling() and uses_triton(OP, x)

    def _normalize(self, x: Tensor, shape: tuple[int], weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_rms:
            return F.rms_norm(x, shape, weight, self.eps)
        return F.layer_norm(x, shape, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.config.normalization}, {self.hidden_size}, eps={self.eps}, zero_centered={self.zero_centered}"


class ResidualNorm(Norm):
    """`Norm` whose input is a residual connection's too: the backward pass adds both gradients in one kernel."""

    def forward(self, x: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """`Norm.forward`'s result, or a pair of it and the rows for the residual connection, as Megatron's layer takes.

        Where the norm is recomputed, Megatron frees what it returned: the rows must not be among that.
        """
        config = self.config
        recomputed = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
        if x is None or recomputed or not self._fuses(x):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps, self.zero_centered)
