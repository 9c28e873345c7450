"""The trainer's count of floating-point operations, for KSA models."""

from collections.abc import Callable

from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.flops import ksa_flops, stage_flops
from megatron_ksa.upstream.patches import Patch


def _count(dense: Callable, settings: RunSettings) -> Callable:
    ksa = ksa_flops(dense, settings.ksa)
    return stage_flops(dense, ksa, train=settings.train, distills=settings.distill.enabled)


PATCHES = (
    # `given(settings)`: those of the run.
    Patch(
        "megatron.training.training:num_floating_point_operations",
        _count,
        why="Megatron counts dense attention and no summary rows",
        expects="(args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None)",
    ),
)


def patches(settings: RunSettings) -> tuple[Patch, ...]:
    """The count of a KSA model's work; Megatron's model keeps Megatron's count."""
    return tuple(patch.given(settings) for patch in PATCHES) if settings.ksa.enabled else ()
