"""The embedding's gradient goes to its buffer, as those of linear layers do with gradient accumulation fusion.

Megatron 0.19.2 lets torch form it for all words, in 16 bits and with zeros for those that do not occur, and adds that
to the buffer: 10 bytes a parameter of the embedding, for 8,192 rows of the 151,936 of the 1.9B model.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.kernels.embedding_gradient import add_rows
from megatron_ksa.kernels.weight_gradient import unwritten
from megatron_ksa.upstream.patches import Patch
from megatron_ksa.upstream.saved_weights import in_its_buffer


class _Lookup(torch.autograd.Function):
    """weight[words]; the gradient is added to `weight.main_grad` by Megatron's protocol."""

    @staticmethod
    def forward(ctx: FunctionCtx, words: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        # The buffer of this model chunk, not a tensor of autograd's.
        ctx.weight = weight
        return F.embedding(words, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[None, Tensor]:
        (words,), weight = ctx.saved_tensors, ctx.weight
        unwritten.fill(weight.main_grad)
        add_rows(words.flatten(), d_out.flatten(0, -2), weight.main_grad)
        return None, in_its_buffer(weight)


def _adds_itself(embedding: VocabParallelEmbedding) -> bool:
    """Whether the gradient may go to the buffer: all words on this rank, and no other layer has the same weight."""
    weight = embedding.weight
    return (
        fuses("embedding")
        and torch.is_grad_enabled()
        and weight.requires_grad
        and embedding.config.gradient_accumulation_fusion
        and embedding.tp_group.size() == embedding.gtp_remat_size == 1
        and getattr(weight, "main_grad", None) is not None
        and weight.main_grad.dtype == torch.float32
        and hasattr(weight, "grad_added_to_main_grad")
        and not getattr(weight, "shared_embedding", False)
        and not getattr(weight, "zero_out_wgrad", False)
    )


def _forward(original: Callable) -> Callable:
    """`VocabParallelEmbedding.forward`."""

    @wraps(original)
    def forward(self: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        if not _adds_itself(self):
            return original(self, input_)
        rows = _Lookup.apply(input_, self.weight)
        # With one rank, what would scatter rows over the ranks only changes their order.
        return rows.transpose(0, 1).contiguous() if self.reduce_scatter_embeddings else rows

    return forward


PATCHES = (
    Patch(
        "megatron.core.tensor_parallel.layers:VocabParallelEmbedding.forward",
        _forward,
        why="the embedding's gradient is formed for words that do not occur",
        expects="(self, input_)",
    ),
)
