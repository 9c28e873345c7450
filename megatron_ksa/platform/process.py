"""The replacements that every process which uses Megatron needs on this machine, whatever its model."""

import importlib
import os
import pkgutil
import sys
from importlib.metadata import version

from megatron_ksa import upstream
from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform
from megatron_ksa.upstream.patches import Patch, apply_for_good

WRITTEN_FOR = "0.19.2"


def prepare_process(fsdp2: bool, trust_checkpoint: bool = False, checkpoint_sums: bool = True) -> None:
    """Put them in place; may be called repeatedly. Call it before Megatron is imported.

    Args:
        fsdp2: torch's FSDP is asked for, with which Megatron refuses gradient accumulation fusion.
        trust_checkpoint: checkpoints may hold objects of any class.
        checkpoint_sums: what is read of a checkpoint is compared with its sums.

    Raises:
        UsageError: a target that is not what its replacement was written for.
    """
    activate_cpu_platform()
    # These import Megatron, which must come after the CPU platform.
    from megatron_ksa.upstream import (
        activation,
        checkpoint_comparison,
        checkpoint_pickle,
        dataset_helpers,
        distributed_optimizer,
        embedding,
        gradient_buffers,
        one_pass_optimizer,
        optimizer_kernels,
        recomputed_biases,
        reshardable_state,
        saved_weights,
        te_gradients,
        weight_gradients,
    )

    fused = () if fsdp2 else weight_gradients.patches()
    gradients = (*fused, *gradient_buffers.PATCHES, *te_gradients.patches())
    pickles = () if trust_checkpoint else checkpoint_pickle.PATCHES
    optimizer = (*distributed_optimizer.patches(), *optimizer_kernels.patches(), *one_pass_optimizer.patches())
    comparisons = checkpoint_comparison.PATCHES if checkpoint_sums else ()
    used = [
        *gradients,
        *activation.PATCHES,
        *embedding.PATCHES,
        *saved_weights.PATCHES,
        *recomputed_biases.PATCHES,
        *reshardable_state.PATCHES,
        *pickles,
        *comparisons,
        *dataset_helpers.PATCHES,
        *optimizer,
    ]
    apply_for_good(used)
    installed = version("megatron-core")
    if installed != WRITTEN_FOR and used and os.environ.get("RANK", "0") == "0":
        names = ", ".join(patch.target.partition(":")[2] for patch in used)
        said = f"megatron-core {installed}, not {WRITTEN_FOR}: replaced, with fitting signatures: {names}"
        print(said, file=sys.stderr, flush=True)


def declared() -> list[Patch]:
    """Every replacement that a module of this folder declares; imports Megatron."""
    names = [module.name for module in pkgutil.walk_packages(upstream.__path__, f"{upstream.__name__}.")]
    return [patch for name in names for patch in getattr(importlib.import_module(name), "PATCHES", ())]
