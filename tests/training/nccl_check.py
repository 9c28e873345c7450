"""Two GPUs against one: the trainer under NCCL in each layout of two ranks, from one checkpoint.

    python tests/training/nccl_check.py --out nccl.json
    python tests/training/nccl_check.py --only 'CP 2, all-to-all' 'PP 2'

Float32 losses and gradient norms of every step must be those of a single process to 1e-5, bf16 ones to the rounding of
16-bit weights and activations. Each layout has processes of its own and --limit seconds; one that hangs is named, with
the stacks of its ranks, and the next one begins. Without GPUs the same runs go over gloo. Exit code 0 where all agree.
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


def deviation(trained: dict, expected: dict) -> float:
    """Largest relative difference of a loss or gradient norm."""
    pairs = [(trained[i][name], expected[i][name]) for i in trained for name in expected[i]]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def train(folder: Path, runs: list[tuple[Path, str]], processes: int, limit: float) -> tuple[str, float]:
    """Launch the runs; what went wrong, in a line ("" where all have trained every step), and the seconds.

    The ranks' errors, or their stacks where they do not end, go to stderr.
    """
    began = time.monotonic()
    done = launch(runs, processes, limit=limit)
    took = time.monotonic() - began
    if done.returncode == 0:
        return "", took
    stacks = {rank: folder / f"stacks{rank}.txt" for rank in range(processes)}
    hung = {rank: path.read_text() for rank, path in stacks.items() if path.exists() and path.stat().st_size}
    print(file=sys.stderr)
    for rank, stack in hung.items():
        print(f"rank {rank}:\n{stack}", file=sys.stderr)
    print(done.stderr[-6000:], file=sys.stderr, flush=True)
    return (f"no end within {limit:.0f} s" if hung else f"exit code {done.returncode}"), took


def check(folder: Path, names: list[str], limit: float) -> dict:
    """Train in one process, then each layout in two; what came out of each."""
    start = f"--train-iters {STEPS} --load {folder}/saved --ckpt-step 1 --finetune {SIZE}"
    used = dict.fromkeys(LAYOUTS[name][1] for name in names)
    single = {flags: folder / f"single{number}.json" for number, flags in enumerate(used)}
    first = (folder / "start.json", f"--train-iters 1 --save {folder}/saved --save-interval 1 {SIZE}")
    runs = [first, *((record, f"{start} {flags}") for flags, record in single.items())]
    print("single process: ", end="", flush=True)
    failed, took = train(folder, runs, 1, limit * len(runs))
    print(f"{failed or 'trained'}, {took:.0f} s", flush=True)
    if failed:
        raise SystemExit("error: there is nothing to compare with")
    results = {}
    for number, name in enumerate(names):
        layout, flags = LAYOUTS[name]
        print(f"{number + 1:2}/{len(names)} {name}: ", end="", flush=True)
        record = folder / f"layout{number}.json"
        failed, took = train(folder, [(record, f"{start} {layout} {flags}")], 2, limit)
        results[name] = {"flags": f"{layout} {flags}".strip(), "seconds": round(took, 1), "agrees": False}
        if failed:
            results[name]["failed"] = failed
        else:
            worst, allowed = deviation(steps(record), steps(single[flags])), TOLERANCES[flags]
            results[name] |= {"largest_relative_deviation": worst, "allowed": allowed, "agrees": worst <= allowed}
            failed = f"{'ok' if worst <= allowed else 'FAIL'}, {worst:.1e} (allowed {allowed:.0e})"
        print(f"{failed}, {took:.0f} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME",
                        help=f"layouts to check, of: {'; '.join(LAYOUTS)}")  # fmt: skip
    parser.add_argument("--limit", type=float, default=180, help="seconds for a layout (default: %(default)s)")
    args = parser.parse_args()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        raise SystemExit("error: one GPU; two are needed, or none for gloo")
    # Tensor and context parallelism want it before CUDA starts.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        results = check(Path(folder), args.only, args.limit)
    device = torch.cuda.get_device_name() if gpus else "CPU, gloo"
    record = {"device": device, "torch": torch.__version__, "steps": STEPS, "layouts": results}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(result["agrees"] for result in results.values()))


if __name__ == "__main__":
    main()
