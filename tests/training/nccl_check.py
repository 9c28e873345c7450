"""Two GPUs against one: the trainer under NCCL in each layout of two ranks, from one checkpoint.

    python tests/training/nccl_check.py --out nccl.json

Float32 losses and gradient norms of every step must be those of a single process to 1e-5, bf16 ones to the rounding of
16-bit weights and activations. Without GPUs the same runs go over gloo. Exit code 0 where all layouts agree, else 1.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from trainer import launch, steps

STEPS = 4
# Heads of 32 channels, the smallest that attention kernels are tuned for; eight chunks in each segment of CP 2.
SIZE = (
    "--hidden-size 128 --ffn-hidden-size 256 --kv-channels 32 --seq-length 256 --max-position-embeddings 256 "
    "--distributed-timeout-minutes 1"
)
PACKED = "--reset-position-ids --reset-attention-mask"
TP, CP, PP = "--tensor-model-parallel-size 2", "--context-parallel-size 2", "--pipeline-model-parallel-size 2"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BF16 = "--bf16"
# Each with the flags that the single process needs too.
LAYOUTS = {
    "TP 2": (TP, ""),
    "TP 2 + SP, chunked loss": (f"{TP} --sequence-parallel --loss-chunk-rows 96", ""),
    "CP 2, halos and summaries": (CP, ""),
    "CP 2, halos and summaries, documents": (f"{CP} {RECOMPUTE}", PACKED),
    "CP 2, all-to-all": (f"{CP} --cp-comm-type a2a", ""),
    "PP 2": (PP, ""),
    "PP 2, interleaved": (f"{PP} --num-virtual-stages-per-pipeline-rank 2", ""),
    "DP 2, distributed optimizer": (OVERLAP, ""),
    "CP 2, distributed optimizer, bf16": (f"{CP} {OVERLAP}", BF16),
    "TP 2 + SP, bf16": (f"{TP} --sequence-parallel", BF16),
}
TOLERANCES = {"": 1e-5, PACKED: 1e-5, BF16: 5e-3}


def deviation(actual: dict, expected: dict) -> float:
    """Largest relative difference of a loss or gradient norm; infinity where an iteration is missing."""
    if sorted(actual) != list(range(1, STEPS + 1)):
        return float("inf")
    pairs = [(actual[i][name], expected[i][name]) for i in actual for name in expected[i]]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def check(folder: Path) -> dict:
    """Train in one process, then in two; the deviation of each layout."""
    start = f"--train-iters {STEPS} --load {folder}/saved --ckpt-step 1 --finetune {SIZE}"
    single = {flags: folder / f"single{number}.json" for number, flags in enumerate(TOLERANCES)}
    first = (folder / "start.json", f"--train-iters 1 --save {folder}/saved --save-interval 1 {SIZE}")
    began = time.monotonic()
    alone = launch([first, *((record, f"{start} {flags}") for flags, record in single.items())], processes=1)
    if not all(record.exists() for record in single.values()):
        raise SystemExit(f"error: the single process failed\n{alone.stderr[-6000:]}")
    print(f"single process: {time.monotonic() - began:.0f} s", flush=True)
    records = {name: folder / f"layout{number}.json" for number, name in enumerate(LAYOUTS)}
    runs = [(records[name], f"{start} {layout} {flags}") for name, (layout, flags) in LAYOUTS.items()]
    both = launch(runs, processes=2)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)
    results = {}
    for name, (layout, flags) in LAYOUTS.items():
        trained = steps(records[name]) if records[name].exists() else {}
        worst, allowed = deviation(trained, steps(single[flags])), TOLERANCES[flags]
        results[name] = {"flags": f"{layout} {flags}".strip(), "largest_relative_deviation": worst, "allowed": allowed}
        print(f"{'ok  ' if worst <= allowed else 'FAIL'} {name}: {worst:.1e} (allowed {allowed:.0e})", flush=True)
    if both.returncode:
        print(both.stderr[-6000:], file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations")
    args = parser.parse_args()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        raise SystemExit("error: one GPU; two are needed, or none for gloo")
    # Tensor and context parallelism want it before CUDA starts, and all runs share their processes.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        results = check(Path(folder))
    device = torch.cuda.get_device_name() if gpus else "CPU, gloo"
    record = {"device": device, "torch": torch.__version__, "steps": STEPS, "layouts": results}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(r["largest_relative_deviation"] > r["allowed"] for r in results.values()))


if __name__ == "__main__":
    main()
