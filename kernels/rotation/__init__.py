"""RMS norm of query and key heads and their rotation by explicit positions (RoPE, HARPE), in one pass.

`rotate_heads` takes Triton kernels on a GPU and `reference.rotate` elsewhere.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.rotation import reference
from megatron_ksa.kernels.rotation.reference import fixed_point, mix

OP = "norm and rotation of query and key heads"

rotate_heads = by_device(OP, "megatron_ksa.kernels.rotation.triton_rotation:rotate")(reference.rotate)

__all__ = ["OP", "fixed_point", "mix", "reference", "rotate_heads"]
