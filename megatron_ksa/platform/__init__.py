"""What the trainer needs from the machine: CPU as a device, defaults by what is installed."""

from megatron_ksa.platform.cpu import activate_cpu_platform
from megatron_ksa.platform.defaults import prepare_platform, trainer_defaults

__all__ = ["activate_cpu_platform", "prepare_platform", "trainer_defaults"]
