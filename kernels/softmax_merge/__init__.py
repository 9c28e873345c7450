"""Attention to two disjoint sets of keys from that to each: Triton kernels on a GPU, `reference` elsewhere."""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.softmax_merge import reference

OP = "softmax merge"

merge = by_device(OP, "megatron_ksa.kernels.softmax_merge.triton_kernels:merge")(reference.merge)

__all__ = ["merge", "reference"]
