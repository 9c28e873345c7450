"""RMS norm in plain PyTorch: what the Triton kernels are compared with.

    y = x / sqrt(mean(x^2) + eps) * g,    g = weight, or 1 + weight

With x^ = x / rms and dn = dy g: dx = (dn - x^ mean(dn x^)) / rms, dg = sum over rows of dy x^. Where a residual
connection takes x too, the gradient of x is dx plus the residual's gradient.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> tuple[Tensor, Tensor]:
    """Normalised rows, and the rows themselves for the residual connection.

    Args:
        x: [..., size], bfloat16, float16, float32 or float64.
        weight: [size], in the same or another of these dtypes.
        eps: added to the mean square.
        zero_centered: the gain is 1 + weight.

    Returns:
        y in the dtype of x, and x; sums and products are float32, or float64 where x is.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gain = weight.to(wide) + 1.0 if zero_centered else weight.to(wide)
    rows = x.to(wide)
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype), x
