"""Rows that PyTorch's own operations save, kept by Megatron's CUDA graphs of layers (`--cuda-graph-impl local`).

Megatron 0.19.2 gives the memory of a layer's input back to its graphs' pool before the backward pass is captured,
unless it has seen Python's `save_for_backward` take the tensor. PyTorch's own operations save in C++, where Megatron
does not look. Other layers' rows were then written over what `rms_norm` had saved, and gradients came out wrong without
an error: those of a model of four layers had norms up to 4 % off on an H200.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Saved(torch.autograd.Function):
    """The identity, whose input is saved until its backward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def kept_by_graphs(rows: Tensor, config: TransformerConfig) -> Tensor:
    """`rows` for an operation of PyTorch that saves its input, which may be that of a layer in a graph."""
    return _Saved.apply(rows) if config.cuda_graph_impl == "local" else rows
