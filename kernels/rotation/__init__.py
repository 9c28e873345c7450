"""RMS norm of query and key heads and their rotation by explicit positions (RoPE, HARPE), in one pass."""

from megatron_ksa.kernels.rotation.dispatch import rotate as rotate_heads
from megatron_ksa.kernels.rotation.reference import fixed_point, mix

__all__ = ["fixed_point", "mix", "rotate_heads"]
