"""The gradient of a linear layer's weight, added to its buffer in one product."""

import torch
from torch import Tensor


def add_product(rows: Tensor, d_out: Tensor, total: Tensor) -> None:
    """total += d_out^T @ rows, with sums in float32.

    Args:
        rows: [..., n], inputs of a linear layer.
        d_out: [..., m], gradients of its outputs, in rows' dtype.
        total: [m, n], float32 or rows' dtype.
    """
    rows, d_out = rows.flatten(0, -2), d_out.flatten(0, -2)
    if total.dtype == rows.dtype:
        total.addmm_(d_out.t(), rows)
    elif rows.is_cuda:
        torch.addmm(total, d_out.t(), rows, out_dtype=total.dtype, out=total)
    else:
        total.add_(d_out.t() @ rows)
