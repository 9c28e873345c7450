"""The trainer's count of floating-point operations, for KSA models."""

from megatron.training import training

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.cost.flops import ksa_flops


def install_flops(ksa: KSAConfig) -> None:
    """Make the trainer count a KSA model's work; Megatron's model keeps Megatron's count."""
    if ksa.enabled:
        training.num_floating_point_operations = ksa_flops(training.num_floating_point_operations, ksa)
