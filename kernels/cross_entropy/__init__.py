"""Softmax over a shard of the vocabulary: statistics of rows of logits, and gradients of the logits."""

from megatron_ksa.kernels.cross_entropy.dispatch import gradients, statistics

__all__ = ["gradients", "statistics"]
