"""FP8 against 16 bits: losses of a small KSA model over 200 steps of real text, and runs that go on from a checkpoint.

    python examples/fp8/run.py --out examples/fp8/results.json
    python examples/fp8/report.py examples/fp8/results.json examples/fp8/README.md

Every kind trains on the same sequences: the bytes of this repository's files. Transformer Engine's 16 bits and each
recipe begin three times: from the same weights, and twice with noise in the weights as large as FP8's rounding
(`..._noise_1`), which makes no run better. A recipe is compared with 16 bits from the same start. Each kind without
noise then goes on from its checkpoint halfway. A machine with Transformer Engine and a GPU with FP8 is needed.
A second call with the same --out keeps the kinds that it does not train.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
import numpy as np

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import check_writable, read_json, whole_file

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_ksa", "kernels", "data_tools", "docs", "examples", "tests", "tools")
END_OF_TEXT = 256
MODEL = (
    "--num-layers 8 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 6 --kv-channels 128 "
    "--normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm --swiglu --disable-bias-linear --hidden-dropout 0 "
    "--untie-embeddings-and-output-weights --init-method-std 0.02 --ksa --ksa-window-chunks ([16]*3+[256])*2 "
    "--position-embedding-type rope --seq-length 2048 --max-position-embeddings 2048 --tokenizer-type NullTokenizer "
    "--vocab-size 257 --bf16 --micro-batch-size 8 --global-batch-size 8 --split 100,0,0 --lr 3e-4 --min-lr 3e-5 "
    "--lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 "
    "--eval-iters 0 --log-interval 1 --ckpt-format torch_dist"
).split()
TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8 --seq-length 128 "
    "--ksa-window-chunks ([2]*3+[16]) --lr-warmup-iters 1"
).split()
LOCAL, TE = ["--transformer-impl", "local"], ["--transformer-impl", "transformer_engine"]
RECIPES = ("delayed", "tensorwise", "blockwise")
FP8 = {f"fp8_{recipe}": [*TE, "--fp8-format", "hybrid", "--fp8-recipe", recipe] for recipe in RECIPES}
# Kinds whose initial weights have noise, and its seed.
NOISES = {f"{kind}_noise_{seed}": seed for seed in (1, 2) for kind in ("te", *FP8)}
KINDS = {"local": LOCAL, "te": TE, **FP8, **{kind: ({"te": TE} | FP8)[kind.partition("_noise")[0]] for kind in NOISES}}
LINE = re.compile(r"iteration\s+(\d+)/.*lm loss: ([0-9.]+E[+-]\d+)(?:.*grad norm: ([0-9.]+))?")


@dataclass
class Trained:
    """A run's loss at each of its steps, and the gradient norm of the first, None where the log has none."""

    losses: dict[int, float]
    first_norm: float | None


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


def train(folder: Path, kind: str, flags: list[str], options: argparse.Namespace) -> Trained | str:
    """What a run of a kind logs, or what went wrong."""
    noise = [str(Path(__file__).with_name("with_noise.py")), str(NOISES[kind])] if kind in NOISES else []
    command = [sys.executable, *(noise or [str(ROOT / "pretrain_gpt.py")]), *MODEL, *(TINY if options.tiny else [])]
    command += ["--data-path", str(folder / "text"), "--train-iters", str(options.steps)]
    command += ["--lr-decay-iters", str(options.steps), *KINDS[kind], *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return f"not done after {options.limit:.0f} s"
    lines = LINE.findall(done.stdout)
    if done.returncode or not lines:
        print(done.stderr[-3000:], file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:") or "Error" in line]
        return (errors or [f"exit code {done.returncode}"])[-1][:400]
    losses, first = {int(step): float(loss) for step, loss, _ in lines}, int(lines[0][0])
    if first + 1 in losses:
        # Megatron logs the first step of a run without starting its sum again: the second line is the mean of both.
        losses[first + 1] = round(2 * losses[first + 1] - losses[first], 6)
    return Trained(losses, float(lines[0][2]) if lines[0][2] else None)


def measure(folder: Path, kind: str, options: argparse.Namespace) -> dict:
    """A kind's losses, and those of a run that goes on from its checkpoint halfway."""
    half = options.steps // 2
    saved = ["--save", str(folder / kind), "--save-interval", str(half)]
    whole = train(folder, kind, [] if kind in NOISES else saved, options)
    if isinstance(whole, str):
        return {"kind": kind, "error": whole}
    losses = whole.losses
    result = {"kind": kind, "first_norm": whole.first_norm, "losses": list(losses.values())}
    print(f"{kind}: loss {losses[options.steps]:.4f} after {options.steps} steps", flush=True)
    if kind in NOISES:
        return result
    again = train(folder, kind, ["--load", saved[1], "--ckpt-step", str(half)], options)
    if isinstance(again, str):
        return {**result, "error": f"resumed: {again}"}
    result["resumed_losses"] = list(again.losses.values())
    result["resumed_deviation"] = max(abs(loss / losses[step] - 1) for step, loss in again.losses.items())
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
        folder = Path(made)
        tokens = write_text(folder / "text")
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        rate = MODEL[MODEL.index("--lr") + 1]
        record = {"device": device, "torch": torch.__version__, "tokens": tokens, "steps": options.steps, "lr": rate}
        runs = kept_runs(options.out, record, options.kinds)
        for done in as_completed([pool.submit(measure, folder, kind, options) for kind in options.kinds]):
            result = done.result()
            runs[result["kind"]] = result
            with whole_file(options.out) as stream:
                known = [runs[kind] for kind in KINDS if kind in runs]
                stream.write(json.dumps({**record, "runs": known}, indent=1) + "\n")
    return any("error" in runs[kind] for kind in options.kinds)


def kept_runs(path: Path, record: dict, kinds: list[str]) -> dict[str, dict]:
    """Kinds of an earlier call that this one does not train.

    Raises:
        UsageError: they were trained on another text or machine, or for other steps.
    """
    if not path.exists():
        return {}
    earlier = read_json(path)
    kept = {run["kind"]: run for run in earlier["runs"] if run["kind"] not in kinds}
    for key, value in record.items():
        if kept and earlier[key] != value:
            raise UsageError(
                f"{path} has {', '.join(kept)} of {key} {earlier[key]}, here it is {value}: choose another --out, or "
                f"train these too"
            )
    return kept


if __name__ == "__main__":
    main()
