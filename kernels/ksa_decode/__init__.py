"""Attention of one decoding step: each sequence's newest token, and the summaries of a chunk that it may complete.

`decode_attention` keeps the new keys and values in the layer's cache and attends to it, sequences of any lengths side
by side. It takes Triton kernels on a GPU and `reference` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.ksa_decode import reference
from megatron_ksa.kernels.ksa_decode.geometry import CacheGeometry

OP = "decode attention"

decode_attention = by_device(OP, "megatron_ksa.kernels.ksa_decode.triton_decode:decode_attention")(
    reference.decode_attention
)

__all__ = ["OP", "CacheGeometry", "decode_attention", "reference"]
