"""Peaks that `examples/throughput_1b9` has measured on GPUs, against what the memory model says of these runs.

    python examples/memory_1b9/compare.py docs/results.md examples/throughput_1b9/results_*.json

Writes the section `memory_1b9_throughput` of the Markdown file. Needs no GPU.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import FULL, NONE
from megatron_ksa.cost.memory import MemoryReport, stage_memory
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import replace_section, table

SECTION = "memory_1b9_throughput"
NAMES = {
    "ksa": "KSA", "full": "full attention", "summary": "KSA, summary parameters alone", "distil": "KSA, distillation"
}  # fmt: skip
SHAPE = ModelShape(
    ksa=KSAConfig(enabled=True, window_chunks="([128]*3+[1024])*6"), num_layers=24, hidden=2048, ffn=6144, heads=16,
    kv_heads=16, head_dim=128, vocabulary=151936, qk_norm=True,
)  # fmt: skip
# The shapes of `examples/throughput_1b9/run.py --shape`.
SHAPES = {
    "1b9": SHAPE,
    "8b_8layers": dataclasses.replace(
        SHAPE, ksa=KSAConfig(enabled=True, window_chunks="([128]*3+[1024])*2"), num_layers=8, hidden=4096, ffn=12288,
        heads=32, kv_heads=8,
    ),
}  # fmt: skip


def predicted(run: dict, offloads: bool) -> MemoryReport:
    """What the model says of a run of `examples/throughput_1b9/run.py` on one GPU.

    Args:
        offloads: distillation's teacher waits in host memory.
    """
    shape = SHAPES[run.get("shape", "1b9")]
    if run["model"] == "full":
        shape = dataclasses.replace(shape, ksa=KSAConfig(), angles_per_head=True)
    layout = TrainingLayout(
        text_length=run["length"], recompute=FULL if run["recompute"] == "full" else NONE,
        loss=LossConfig(run["loss_rows"], run.get("kept_logits", 0.0)),
        distributed_optimizer=False, fused_rotation=True, fused_gradient=True,
        train="summary" if run["model"] in ("summary", "distil") else "all", distills=run["model"] == "distil",
        teacher_on_host=offloads,
    )  # fmt: skip
    return stage_memory(shape, layout, 0)


def rows(files: list[Path]) -> list[list[str]]:
    """A row for each run on one GPU that has ended; those of several are in a table of their own."""
    found = []
    for path in files:
        for run in json.loads(path.read_text(encoding="utf-8")):
            if "error" in run or "layout" in run:
                continue
            offloads = "offload" in path.stem and run["model"] == "distil"
            measured, memory = run["peak_gib"], predicted(run, offloads)
            said = memory.total / 2**30
            name = NAMES[run["model"]] + ", teacher on the host" * offloads
            name += ", CUDA graph" * run.get("cuda_graphs", False)
            name += ", 8 layers of the 8B shape" * (run.get("shape") == "8b_8layers")
            kind = run.get("kind", "local")
            found.append([
                run["machine"]["gpu"].removeprefix("NVIDIA "), run["machine"]["commit"][:9], name,
                "" if kind == "local" else kind, f"{run['length']:,}", run["recompute"] or "nothing", f"{measured:.2f}",
                f"{said:.2f}", f"{(said / measured - 1) * 100:+.1f} %", memory.moment,
            ])  # fmt: skip
    return found


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=f"Markdown file with the section {SECTION}")
    parser.add_argument("results", type=Path, nargs="+", help="JSON that examples/throughput_1b9/run.py wrote")
    options = parser.parse_args()
    with usage_errors_exit():
        for path in (options.output, *options.results):
            if not path.is_file():
                raise UsageError(f"{path} does not exist")
        columns = [
            "GPU", "commit", "model", "layers", "text tokens", "recompute", "peak GiB", "predicted", "deviation",
            "fullest in",
        ]  # fmt: skip
        replace_section(options.output, SECTION, table(columns, rows(options.results)))


if __name__ == "__main__":
    main()
