"""Layer norm and RMS norm for the local spec that work with sequence parallelism."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ksa.errors import UsageError


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as `config.normalization` says.

    Megatron's local spec uses torch's modules and refuses sequence parallelism, because their gradients must then be
    summed over the tensor-parallel group: marking the parameters `sequence_parallel` is what Megatron needs for that.
    With `config.layernorm_zero_centered_gamma` the scale is 1 + weight.

    Raises:
        UsageError: a normalization other than LayerNorm and RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise UsageError(f"--normalization {config.normalization} is not supported: use LayerNorm or RMSNorm")
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options = {"dtype": config.params_dtype, "device": device}
        self.weight = nn.Parameter((torch.zeros if self.zero_centered else torch.ones)(hidden_size, **options))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **options)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype; sums are in float32 or better."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
