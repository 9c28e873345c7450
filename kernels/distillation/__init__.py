"""Cross-entropy and KL divergence to a teacher over a shard of the vocabulary: statistics of rows, and gradients."""

from megatron_ksa.kernels.distillation.dispatch import gradients, statistics
from megatron_ksa.kernels.distillation.reference import RowStatistics

__all__ = ["RowStatistics", "gradients", "statistics"]
