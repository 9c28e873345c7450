"""FP8 against 16 bits: losses of a small KSA model over 200 steps of real text, and runs that go on from a checkpoint.

    python examples/fp8/run.py --out examples/fp8/results.json
    python examples/fp8/report.py examples/fp8/results.json examples/fp8/README.md

Every kind trains on the same sequences from the same weights: the bytes of this repository's files. The two kinds in 16
bits differ by rounding alone, which is what a recipe's deviation is to be compared with. Each recipe then goes on from
its checkpoint halfway. A machine with Transformer Engine and a GPU with FP8 is needed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
import numpy as np

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import check_writable, whole_file

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_ksa", "kernels", "data_tools", "docs", "examples", "tests", "tools")
END_OF_TEXT = 256
MODEL = (
    "--num-layers 8 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 6 --kv-channels 128 "
    "--normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm --swiglu --disable-bias-linear --hidden-dropout 0 "
    "--untie-embeddings-and-output-weights --init-method-std 0.02 --ksa --ksa-window-chunks ([16]*3+[256])*2 "
    "--position-embedding-type rope --seq-length 2048 --max-position-embeddings 2048 --tokenizer-type NullTokenizer "
    "--vocab-size 257 --bf16 --micro-batch-size 8 --global-batch-size 8 --split 100,0,0 --lr 1e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 "
    "--eval-iters 0 --log-interval 1 --ckpt-format torch_dist"
).split()
TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8 --seq-length 128 "
    "--ksa-window-chunks ([2]*3+[16]) --lr-warmup-iters 1"
).split()
LOCAL, TE = ["--transformer-impl", "local"], ["--transformer-impl", "transformer_engine"]
RECIPES = ("delayed", "tensorwise", "blockwise")
KINDS = {
    "local": LOCAL, "te": TE,
    **{f"fp8_{recipe}": [*TE, "--fp8-format", "hybrid", "--fp8-recipe", recipe] for recipe in RECIPES},
}  # fmt: skip
LINE = re.compile(r"iteration\s+(\d+)/.*lm loss: ([0-9.]+E[+-]\d+)")


def write_text(prefix: Path) -> int:
    """The repository's sources as a dataset of bytes, a document a file; the number of tokens."""
    number = 0
    with IndexedDatasetWriter(str(prefix), END_OF_TEXT + 1) as writer:
        for folder in FOLDERS:
            for path in sorted((ROOT / folder).rglob("*")):
                if path.suffix in (".py", ".md") and path.is_file():
                    document = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64)
                    writer.add_document(np.append(document, END_OF_TEXT))
                    number += len(document) + 1
    return number


def train(folder: Path, flags: list[str], steps: int, tiny: bool, limit: float) -> dict[int, float] | str:
    """Loss of each step, or what went wrong."""
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *MODEL, *(TINY if tiny else []), "--data-path"]
    command += [str(folder / "text"), "--train-iters", str(steps), "--lr-decay-iters", str(steps), *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    losses = {int(step): float(loss) for step, loss in LINE.findall(done.stdout)}
    if done.returncode or not losses:
        print(done.stderr[-3000:], file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:") or "Error" in line]
        return (errors or [f"exit code {done.returncode}"])[-1][:400]
    first = min(losses)
    if first + 1 in losses:
        # Megatron logs the first step of a run without starting its sum again: the second line is the mean of both.
        losses[first + 1] = round(2 * losses[first + 1] - losses[first], 6)
    return losses


def measure(folder: Path, kind: str, options: argparse.Namespace) -> dict:
    """A kind's losses, and those of a run that goes on from its checkpoint halfway."""
    half = options.steps // 2
    flags, saved = [*KINDS[kind]], ["--save", str(folder / kind), "--save-interval", str(half)]
    whole = train(folder, [*flags, *saved], options.steps, options.tiny, options.limit)
    if isinstance(whole, str):
        return {"kind": kind, "error": whole}
    result = {"kind": kind, "losses": list(whole.values())}
    print(f"{kind}: loss {whole[options.steps]:.4f} after {options.steps} steps", flush=True)
    flags += ["--load", saved[1], "--ckpt-step", str(half)]
    again = train(folder, flags, options.steps, options.tiny, options.limit)
    if isinstance(again, str):
        return {**result, "error": f"resumed: {again}"}
    result["resumed_losses"] = list(again.values())
    result["resumed_deviation"] = max(abs(loss / whole[step] - 1) for step, loss in again.items())
    print(f"{kind}: resumed at step {half}, largest relative deviation {result['resumed_deviation']:.1e}", flush=True)
    return result


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"), help="JSON of the losses")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="what to train")
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind")
    parser.add_argument("--at-once", type=int, default=3, help="kinds on the GPU at a time")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a run is given up")
    parser.add_argument("--tiny", action="store_true", help="a model of the same kind that trains on a CPU in seconds")
    options = parser.parse_args()
    with usage_errors_exit():
        # The learning rate warms up in 20 steps; runs go on from half of them.
        for flag, value, least in (
            ("steps", options.steps, 4 if options.tiny else 40),
            ("at-once", options.at_once, 1),
        ):
            if value < least:
                raise UsageError(f"--{flag} {value}: at least {least}")
        check_writable(options.out.parent)
        failed = compare(options)
    sys.exit(failed)


def compare(options: argparse.Namespace) -> bool:
    """Train every kind, and write the losses after each; whether one of them failed."""
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(options.at_once) as pool:
        folder, runs = Path(made), {}
        tokens = write_text(folder / "text")
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        for done in as_completed(pool.submit(measure, folder, kind, options) for kind in options.kinds):
            result = done.result()
            runs[result["kind"]] = result
            record = {"device": device, "torch": torch.__version__, "tokens": tokens, "steps": options.steps}
            with whole_file(options.out) as stream:
                known = [runs[kind] for kind in options.kinds if kind in runs]
                stream.write(json.dumps({**record, "runs": known}, indent=1) + "\n")
    return any("error" in run for run in runs.values())


if __name__ == "__main__":
    main()
