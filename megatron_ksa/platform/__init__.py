"""What the machine is: defaults of the trainer's flags by what is installed, and free ports."""

from megatron_ksa.platform.defaults import prepare_platform, trainer_defaults

__all__ = ["prepare_platform", "trainer_defaults"]
