"""SwiGLU of rows that hold gate and value side by side.

`swiglu` takes Triton kernels on a GPU and `reference.swiglu` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.swiglu import reference

OP = "SwiGLU"

swiglu = by_device(OP, "megatron_ksa.kernels.swiglu.triton_swiglu:swiglu")(reference.swiglu)

__all__ = ["OP", "reference", "swiglu"]
