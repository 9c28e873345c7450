"""Settings of the kernels."""

from dataclasses import dataclass

from megatron_ksa.config.options import option


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation attention and rotation take."""

    reference: bool = option(False, "Take the PyTorch reference on a GPU too, to compare with the Triton kernels.")
