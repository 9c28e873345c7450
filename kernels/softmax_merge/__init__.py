"""Attention to the union of two disjoint sets of keys, from the attention to each of the two.

`merge_into` takes a Triton kernel on a GPU and `reference.merge_into` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.softmax_merge import reference

OP = "softmax merge"

merge_into = by_device(OP, "megatron_ksa.kernels.softmax_merge.triton_kernels:merge_into")(reference.merge_into)

__all__ = ["merge_into", "reference"]
