"""Softmax over a shard of the vocabulary: statistics of rows of logits, and gradients of the logits.

Both take Triton kernels on a GPU and `reference` elsewhere.
"""

from megatron_ksa.kernels.cross_entropy import reference
from megatron_ksa.kernels.dispatch import by_device

OP = "cross-entropy"
_KERNELS = "megatron_ksa.kernels.cross_entropy.triton_kernels"

statistics = by_device(OP, f"{_KERNELS}:statistics")(reference.statistics)
gradients = by_device(OP, f"{_KERNELS}:gradients")(reference.gradients)

__all__ = ["gradients", "reference", "statistics"]
