"""What the trainer needs from the machine: defaults by what is installed, free ports, the CPU as a device."""

from megatron_ksa.platform.defaults import prepare_platform, trainer_defaults
from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform

__all__ = ["activate_cpu_platform", "prepare_platform", "trainer_defaults"]
