"""Cross-entropy and KL divergence to a teacher over a shard of the vocabulary: statistics of rows, and gradients.

Both take Triton kernels on a GPU and `reference` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.distillation import reference
from megatron_ksa.kernels.distillation.reference import RowStatistics

OP = "distillation"
_KERNELS = "megatron_ksa.kernels.distillation.triton_kernels"

statistics = by_device(OP, f"{_KERNELS}:statistics")(reference.statistics)
gradients = by_device(OP, f"{_KERNELS}:gradients")(reference.gradients)

__all__ = ["RowStatistics", "gradients", "reference", "statistics"]
