"""Attention to the union of two disjoint sets of keys, from the attention to each of the two.

`merge` takes Triton kernels on a GPU and `reference.merge` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.softmax_merge import reference

OP = "softmax merge"

merge = by_device(OP, "megatron_ksa.kernels.softmax_merge.triton_kernels:merge")(reference.merge)

__all__ = ["merge", "reference"]
