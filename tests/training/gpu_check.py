"""The trainer with KSA and HARPE on one GPU: do the kernels and CUDA graphs train to the numbers they should?

    python tests/training/gpu_check.py --out gpu.json [--only reference]

The plain PyTorch path must give the losses of the kernels, and each kind of CUDA graph the losses and gradient norms of
the run without. Exit code 0 where all do, 1 where one does not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from trainer import launch, steps

STEPS = 8
# Heads of 128 channels have the warp-specialised kernels on Hopper; a window ends within the sequence.
SIZE = (
    "--hidden-size 256 --ffn-hidden-size 512 --kv-channels 128 --seq-length 1024 --max-position-embeddings 1024 "
    "--ksa-window-chunks 16"
)
COMMON = f"--train-iters {STEPS} --bf16 --no-check-for-nan-in-loss-and-grad {SIZE}"
# Flags, what is compared, and the largest relative deviation. Kernels and PyTorch round 16-bit numbers elsewhere.
KINDS = {
    "reference": ("--kernels-reference", ("loss",), 1e-3),
    "full_iteration": ("--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 3", ("loss", "grad_norm"), 1e-3),
    "local": ("--cuda-graph-impl local --cuda-graph-warmup-steps 3", ("loss", "grad_norm"), 1e-3),
}


def train(folder: Path, kind: str, flags: str) -> tuple[dict, str | None]:
    """Loss and gradient norm of each step, and what went wrong."""
    record = folder / f"{kind}.json"
    done = launch([(record, f"{COMMON} {flags}")], 1)
    trained = steps(record) if record.exists() else {}
    if len(trained) == STEPS:
        return trained, None
    print(done.stderr[-3000:], file=sys.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:") or "Error" in line]
    return trained, (errors or ["no result"])[0][:400]


def check(folder: Path, kinds: list[str]) -> dict:
    """Deviations of each kind from the kernels' run without graphs, or why it failed."""
    plain, failed = train(folder, "kernels", "")
    results = {"kernels": {"failed": failed} if failed else {"losses": [step["loss"] for step in plain.values()]}}
    for kind in kinds if not failed else ():
        flags, names, limit = KINDS[kind]
        trained, failed = train(folder, kind, flags)
        if failed:
            results[kind] = {"failed": failed}
            continue
        deviations = {
            name: max(abs(trained[i][name] - plain[i][name]) / abs(plain[i][name]) for i in plain)
            for name in ("loss", "grad_norm")
        }
        results[kind] = {"deviations": deviations, "agrees": all(deviations[name] <= limit for name in names)}
        print(kind, results[kind], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: these checks need a GPU")
    with tempfile.TemporaryDirectory() as folder:
        results = check(Path(folder), args.only)
    print(json.dumps(results))
    if args.out:
        args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1) + "\n")
    sys.exit(not all(results.get(kind, {}).get("agrees") for kind in args.only))


if __name__ == "__main__":
    main()
