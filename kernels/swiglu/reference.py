"""SwiGLU in plain PyTorch: what the Triton kernels are compared with.

y = silu(a) b,   silu(a) = a s,   s = 1 / (1 + exp(-a)),   x = [a | b]
da = dy b s (1 + a (1 - s)),   db = dy a s
"""

import torch
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """silu(a) b of each row.

    Args:
        x: [..., 2 size], a and then b; bfloat16, float16, float32 or float64.

    Returns:
        [..., size] in the dtype of x. Arithmetic is float32, or float64 where x is; the result is rounded once.
    """
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(a) * b).to(x.dtype)
