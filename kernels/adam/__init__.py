"""A step of Adam over many parameters, which clips the gradients as it reads them and writes the 16-bit copies.

`adam_step` and `l2_norm` take Triton kernels on a GPU and `reference` elsewhere.
"""

from megatron_ksa.kernels.adam import reference
from megatron_ksa.kernels.adam.reference import AdamTensors
from megatron_ksa.kernels.dispatch import by_device

OP = "Adam"

adam_step = by_device(OP, "megatron_ksa.kernels.adam.triton_adam:adam_step")(reference.adam_step)
l2_norm = by_device(OP, "megatron_ksa.kernels.adam.triton_norm:l2_norm")(reference.l2_norm)

__all__ = ["OP", "AdamTensors", "adam_step", "l2_norm", "reference"]
