"""RMS norm of rows beside a residual connection, each pass once over memory.

`rms_norm` takes Triton kernels on a GPU and `reference.rms_norm` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.norm import reference

OP = "RMS norm"

rms_norm = by_device(OP, "megatron_ksa.kernels.norm.triton_norm:rms_norm")(reference.rms_norm)

__all__ = ["OP", "reference", "rms_norm"]
