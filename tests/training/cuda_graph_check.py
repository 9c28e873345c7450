"""CUDA graphs of the trainer with KSA and HARPE on one GPU: do they train to the numbers of a run without?

    python tests/training/cuda_graph_check.py --out graphs.json

Exit code 0 where each kind of graph gives the losses and gradient norms of the run without, 1 where one does not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from nccl_check import SIZE
from trainer import launch, steps

STEPS = 8
COMMON = f"--train-iters {STEPS} --bf16 --no-check-for-nan-in-loss-and-grad {SIZE}"
KINDS = {
    "none": "",
    "full_iteration": "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 3",
    "local": "--cuda-graph-impl local --cuda-graph-warmup-steps 3",
}
TOLERANCE = 1e-3


def check(folder: Path) -> dict:
    """Deviation from the run without graphs of each kind, or why it failed."""
    results, plain = {}, {}
    for kind, flags in KINDS.items():
        record = folder / f"{kind}.json"
        done = launch([(record, f"{COMMON} {flags}")], 1)
        trained = steps(record) if record.exists() else {}
        plain = plain or trained
        if len(trained) < STEPS:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error:") or "Error" in line]
            print(done.stderr[-3000:], file=sys.stderr)
            results[kind] = {"failed": (errors or ["no result"])[0][:400]}
        else:
            pairs = [(trained[i][name], plain[i][name]) for i in trained for name in trained[i]]
            results[kind] = {"largest_relative_deviation": max(abs(a - b) / abs(b) for a, b in pairs)}
        print(kind, results[kind], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: CUDA graphs need a GPU")
    with tempfile.TemporaryDirectory() as folder:
        results = check(Path(folder))
    if args.out:
        args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "kinds": results}, indent=1) + "\n")
    sys.exit(any(result.get("largest_relative_deviation", 1.0) > TOLERANCE for result in results.values()))


if __name__ == "__main__":
    main()
