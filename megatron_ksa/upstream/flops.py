"""The trainer's count of floating-point operations, for KSA models."""

from megatron.training import training

from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.flops import ksa_flops, stage_flops


def install_flops(settings: RunSettings) -> None:
    """Make the trainer count a KSA model's work; Megatron's model keeps Megatron's count."""
    if settings.ksa.enabled:
        dense = training.num_floating_point_operations
        training.num_floating_point_operations = stage_flops(
            dense, ksa_flops(dense, settings.ksa), train=settings.train, distills=settings.distill.enabled
        )
