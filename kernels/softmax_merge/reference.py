"""Softmax over two disjoint sets of keys from the softmax over each, in plain PyTorch.

out = w * a + (1 - w) * b, w = sigmoid(lse_a - lse_b) = exp(lse_a) / (exp(lse_a) + exp(lse_b))
"""

import torch
from torch import Tensor


class _Merge(torch.autograd.Function):
    """Nothing but the inputs is kept for the backward pass."""

    @staticmethod
    def forward(ctx, a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
        ctx.save_for_backward(a, lse_a, b, lse_b)
        return torch.lerp(b.to(lse_b.dtype), a.to(lse_a.dtype), _share(lse_a, lse_b)).to(a.dtype)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        a, lse_a, b, lse_b = ctx.saved_tensors
        w = _share(lse_a, lse_b)
        d_rows = d_out.to(w.dtype)
        d_w = (d_rows * (a.to(w.dtype) - b.to(w.dtype))).sum(-1, keepdim=True)
        d_lse = (d_w * w * (1 - w)).squeeze(-1).transpose(1, 2)
        return (d_rows * w).to(a.dtype), d_lse, (d_rows * (1 - w)).to(b.dtype), -d_lse


def _share(lse_a: Tensor, lse_b: Tensor) -> Tensor:
    """w as [batch, rows, heads, 1], from [batch, heads, rows]; 1 where b has no key."""
    return torch.sigmoid(lse_a - lse_b).transpose(1, 2)[..., None]


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """The attention of queries to two disjoint sets of keys, from their attention to each.

    Args:
        a, b: [batch, rows, heads, head_dim]; b of a row without a key is 0, its lse_b -inf.
        lse_a, lse_b: log-sum-exp of the scores, [batch, heads, rows]; lse_a is finite.

    Returns:
        [batch, rows, heads, head_dim], in a's dtype.
    """
    return _Merge.apply(a, lse_a, b, lse_b)
