"""Which tests share a worker of pytest-xdist: `--dist loadgroup` gives every group to one worker."""

import os
from pathlib import Path

TESTS = Path(__file__).parent
# Modules that start several ranks or Slurm, as paths below tests/. They are one group: the ranks of two modules would
# take the processor from each other, and time out.
WORLD = frozenset(
    """
    checkpoint/test_integrity.py
    context_parallel/test_attention.py
    cost/test_memory.py
    cost/test_traffic.py
    examples/test_demo.py
    examples/test_several_gpus.py
    huggingface/test_logits.py
    huggingface/test_trainer.py
    model/test_chunked_loss.py
    model/test_gpt_ranks.py
    test_errors.py
    test_missing_ranks.py
    tools/test_plan_cluster.py
    training/test_dense_start.py
    training/test_distill.py
    training/test_dropped_passes.py
    training/test_experts.py
    training/test_failure.py
    training/test_kills.py
    training/test_nccl.py
    training/test_parallel.py
    training/test_recompute_to_fit.py
    training/test_stages.py
    training/test_wire.py
    """.split()
)

# Modules that start Slurm's daemons, which wait most of the time: another worker has room for them.
SLURM = frozenset({"slurm/test_job.py", "slurm/test_torchrun.py"})
# The other modules whose scripts are forks (tests/warm.py): together, so that Megatron is imported for their forks
# in one worker and not in each of them.
FORKS = frozenset(
    """
    examples/test_fp8_example.py
    examples/test_from_dense.py
    examples/test_memory_1b9.py
    examples/test_step_parts.py
    examples/test_throughput.py
    huggingface/test_bad_input.py
    huggingface/test_folders.py
    huggingface/test_like.py
    tools/test_fuzzed_commands.py
    tools/test_inspect_summaries.py
    training/test_arguments.py
    training/test_loss_mask.py
    training/test_refused_runs.py
    """.split()
)
GROUPS = {"world": WORLD, "slurm": SLURM, "forks": FORKS}
# What takes longest comes first: the three groups, then the modules that compute for more than 10 s.
ORDER = (
    *GROUPS, "kernels/benchmarks/test_runner.py", "data_tools/tags/test_kill.py",
    "kernels/ksa_attention/test_triton.py", "kernels/ksa_attention/test_features.py", "inference/test_state.py",
    "huggingface/test_modeling.py", "data_tools/test_preprocess.py", "data_tools/tags/test_report_page.py",
    "examples/test_library.py", "kernels/test_alone.py",
    "kernels/test_for_hopper.py", "kernels/rotation/test_rotation.py",
    "kernels/ksa_decode/test_decode_attention.py",
)  # fmt: skip


def group(module: Path) -> str:
    """The group of GROUPS that names the module; any other module is its own, so that its fixtures are made once."""
    name = os.path.relpath(module, TESTS)
    return next((group for group, modules in GROUPS.items() if name in modules), name)


def place(module: Path) -> int:
    """Where a module's group stands in the order in which workers take groups."""
    name = group(module)
    return ORDER.index(name) if name in ORDER else len(ORDER)
