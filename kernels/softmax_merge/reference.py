"""Softmax over two disjoint sets of keys from the softmax over each, in plain PyTorch.

out = w * a + (1 - w) * b, w = sigmoid(lse_a - lse_b) = exp(lse_a) / (exp(lse_a) + exp(lse_b))
lse = log(exp(lse_a) + exp(lse_b))
"""

import torch
from torch import Tensor


def merge_into(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> None:
    """Turn the attention of queries to one set of keys, in place, into that to two disjoint sets.

    Nothing is recorded for a backward pass: attention's own takes the merged output and log-sum-exp.

    Args:
        a: output of the attention to the first set, [batch, rows, heads, head_dim]; becomes that to both.
        lse_a: log-sum-exp of its scores, [batch, heads, rows], finite; becomes that of both.
        b, lse_b: the same of the second set; b of a row without a key is 0, its lse_b -inf.
    """
    w = torch.sigmoid(lse_a - lse_b).transpose(1, 2)[..., None]
    a.copy_(torch.lerp(b.to(w.dtype), a.to(w.dtype), w))
    lse_a.copy_(torch.logaddexp(lse_a, lse_b))
