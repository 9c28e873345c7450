"""Throughput of the KSA report's 1.9B model on one GPU: KSA against the same model with full attention.

    python examples/throughput_1b9/run.py --report docs/results.md
    python examples/throughput_1b9/run.py --models ksa summary distil --lengths 8192 32768 --out distil.json
    python examples/throughput_1b9/run.py --models ksa --lengths 8192 --kinds local te fp8_delayed fp8_delayed+graph
    python examples/throughput_1b9/run.py --shape 8b_8layers --models ksa --lengths 8192 --kinds te fp8_tensorwise

Each length and model trains a few iterations through `pretrain_gpt.py` in a process of its own, on generated tokens,
without saving. Results are written after each; a second call goes on with those that are missing or failed.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.evaluation.runs import stored_runs
from megatron_ksa.files import check_writable, whole_file, writing

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "slurm" / "models" / "ksa_1b9.args"
MODELS = ("ksa", "full")
# The same KSA model when only its summary parameters train, without and with distillation's teacher.
STAGES = {"summary": ["--ksa-train", "summary"], "distil": ["--ksa-distill"]}
LENGTHS = (8192, 32768, 131072)
# From here on the activations of the 24 layers do not fit 80 GB beside parameters and optimizer.
RECOMPUTE_FROM = 32768
# Iterations before those that count, and those, by length.
ITERATIONS = {8192: (3, 6), 32768: (2, 4), 131072: (1, 2)}
# What the file of the model says about its data, its attention and its schedule, with the number of values.
REPLACED = {
    "--ksa": 0, "--ksa-window-chunks": 1, "--position-embedding-type": 1, "--tokenizer-type": 1, "--vocab-size": 1,
    "--lr-decay-style": 1, "--lr-wsd-decay-style": 1, "--lr-wsd-decay-iters": 1, "--lr-warmup-iters": 1,
    "--seq-length": 1, "--global-batch-size": 1, "--train-iters": 1,
}  # fmt: skip
# One CUDA graph holds forward and backward passes of an iteration, after as many iterations without it.
GRAPH_WARM_UP = 3
GRAPHS = [
    "--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", str(GRAPH_WARM_UP),
    "--no-check-for-nan-in-loss-and-grad",
]  # fmt: skip
TE, FUSER = ["--transformer-impl", "transformer_engine"], ["--use-transformer-engine-op-fuser"]
# Kinds of layers and precision; with "+graph" the iteration is captured in a CUDA graph.
LAYERS = {
    "default": [], "local": ["--transformer-impl", "local"], "te": TE,
    **{f"fp8_{recipe}": [*TE, "--fp8-format", "hybrid", "--fp8-recipe", recipe]
       for recipe in ("delayed", "tensorwise", "blockwise")},
}  # fmt: skip
LAYERS |= {f"{kind}_fuser": [*LAYERS[kind], *FUSER] for kind in ("te", "fp8_tensorwise", "fp8_blockwise")}
KINDS = [kind + graph for graph in ("", "+graph") for kind in LAYERS]
# Flags of a shape, its layers and its K/V heads; 8b_8layers has layers of an 8B model's size.
SHAPES = {
    "1b9": ("", 24, 16),
    "8b_8layers": (
        "--num-layers 8 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8",
        8, 8,
    ),
}  # fmt: skip
TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8 "
    "--vocab-size 127 --make-vocab-size-divisible-by 64"
).split()


def read_flags(path: Path) -> list[list[str]]:
    """Flags of a file, each with its values."""
    words = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in words if line]


def captures(kind: str, options: argparse.Namespace) -> bool:
    """Whether runs of a kind capture their iterations."""
    return options.cuda_graphs or kind.endswith("+graph")


def training_flags(model: str, length: int, kind: str, options: argparse.Namespace) -> list[str]:
    """The command line of `pretrain_gpt.py` for one run."""
    shape, layers, groups = SHAPES[options.shape]
    given = read_flags(MODEL)
    kept = [word for flag in given if flag[0] not in REPLACED for word in flag]
    if options.tiny:
        kept = [word for word in kept if word != "--bf16"]
    heads = TINY[TINY.index("--num-attention-heads") + 1] if options.tiny else groups
    windows = "([2]*3+[8])" if options.tiny else f"([128]*3+[1024])*{layers // 4}"
    # Without Transformer Engine, dense layers get fused attention and rotation from this project's model, which HARPE
    # asks for; equal bases are plain RoPE.
    ksa = ["--ksa", "--ksa-window-chunks", windows, "--position-embedding-type", "rope"]
    full = ["--position-embedding-type", "harpe", "--harpe-bases", ",".join(["10000"] * int(heads))]
    attention = full if model == "full" else [*ksa, *STAGES.get(model, [])]
    warm_up, measured = iterations(length, kind, options)
    run = [
        "--seq-length", length, "--global-batch-size", 1, "--train-iters", warm_up + measured + bool(options.profile),
        "--mock-data", "--split", "100,0,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", 151935,
        "--lr-decay-style", "constant", "--eval-iters", 0, "--log-interval", 1, "--loss-chunk-rows", options.loss_rows,
        "--loss-kept-logits", options.kept_logits,
    ]  # fmt: skip
    if length >= RECOMPUTE_FROM or options.tiny:
        run += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    if captures(kind, options):
        run += GRAPHS
    run += LAYERS[kind.removesuffix("+graph")]
    return [*kept, *attention, *shape.split(), *map(str, run), *(TINY if options.tiny else []), *options.extra]


def iterations(length: int, kind: str, options: argparse.Namespace) -> tuple[int, int]:
    """Iterations before those that count, and those."""
    warm_up, measured = ITERATIONS.get(length, (1, 2)) if options.iterations is None else (1, options.iterations)
    return warm_up + GRAPH_WARM_UP * captures(kind, options), measured


def measure(model: str, length: int, kind: str, options: argparse.Namespace) -> dict:
    """Train and return what `timed_pretrain.py` wrote, or what went wrong."""
    name = f"{options.shape}-{model}-{length}-{kind}"
    record = options.out.with_suffix(f".{name}.part")
    flags = training_flags(model, length, kind, options)
    warm_up, measured = iterations(length, kind, options)
    command = [sys.executable, str(HERE / "timed_pretrain.py"), str(record), str(warm_up), str(measured)]
    command += [str(options.profile / f"{name}.txt") if options.profile else "-", *flags]
    result = run_recorded(command, record, options.limit)
    if options.commit and "machine" in result:
        result["machine"]["commit"] = options.commit
    run = {"model": model, "length": length, "cuda_graphs": captures(kind, options)}
    if (options.shape, kind) != ("1b9", "default"):
        run |= {"shape": options.shape, "kind": kind}
    return {**result, **run}


def run_recorded(command: list[str], record: Path, limit: float) -> dict:
    """What a process wrote to `record`, and under "error" why it did not end well within `limit` seconds."""
    record.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command, timeout=limit, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        )  # fmt: skip
        failure = None if done.returncode == 0 and record.exists() else _reason(done.stderr)
    except subprocess.TimeoutExpired:
        failure = f"not done after {limit:.0f} s"
    result = json.loads(record.read_text()) if record.exists() else {}
    record.unlink(missing_ok=True)
    return result if failure is None else {**result, "error": failure}


def _reason(stderr: str) -> str:
    """The line that says what went wrong; all of it goes to this process's stderr."""
    print(stderr[-6000:], file=sys.stderr)
    lines = [line for line in stderr.splitlines() if "Error" in line or line.startswith("error:")]
    return (lines or ["it ended without a result"])[-1].strip()[:300]


def identity(run: dict) -> tuple:
    """What two runs of the same measurement have in common."""
    return (
        run.get("model"), run.get("length"), run.get("cuda_graphs", False), run.get("shape", "1b9"),
        run.get("kind", "default"),
    )  # fmt: skip


def compare_kinds(runs: list[dict]) -> list[str]:
    """Tokens/s of each kind of layers, a line a model; those of the same machine alone are comparable."""
    found: dict[tuple, list[str]] = {}
    for run in runs:
        if "error" not in run and "kind" in run:
            said = f"{run['kind']} {run['tokens_per_second']:,.0f}" + (f" (MFU {run['mfu']:.3f})" if run["mfu"] else "")
            found.setdefault((run["shape"], run["model"], run["length"]), []).append(said)
    return [f"{shape}, {model}, {length:,} tokens: {', '.join(said)}" for (shape, model, length), said in found.items()]


def compare_stages(runs: list[dict]) -> list[str]:
    """What a step of distillation costs against a plain step of the KSA model, a line a length."""
    done = {
        (run["length"], run["model"]): run
        for run in runs if "error" not in run and not run["cuda_graphs"] and "kind" not in run
    }  # fmt: skip
    lines = []
    for length in sorted({length for length, model in done if model == "distil"}):
        distil, ksa, summary = (done.get((length, model)) for model in ("distil", "ksa", "summary"))
        parts = {name: ms for name, ms in distil["parts_ms"].items() if name.startswith("teacher")}
        line = f"{length:,} tokens: {distil['iteration_ms']:,.0f} ms a distillation step, {distil['peak_gib']:.2f} GiB"
        if ksa:
            ratio = distil["iteration_ms"] / ksa["iteration_ms"]
            line += f"; {ratio:.2f} of a KSA step ({ksa['iteration_ms']:,.0f} ms)"
        if summary:
            line += f"; {distil['peak_gib'] - summary['peak_gib']:+.2f} GiB by the teacher"
        lines.append(line + "".join(f"; {name} {ms / distil['iteration_ms']:.0%}" for name, ms in parts.items()))
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="results, read and added to")
    parser.add_argument("--report", type=Path, help="Markdown file whose throughput_1b9 section gets the tables")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="text tokens of a sequence")
    parser.add_argument("--cuda-graphs", action="store_true", help="capture each iteration in a CUDA graph")
    parser.add_argument(
        "--kinds", nargs="+", default=["default"], choices=KINDS, metavar="KIND",
        help=f"layers and precision: {', '.join(LAYERS)}, each also with +graph for CUDA graphs",
    )  # fmt: skip
    parser.add_argument("--shape", default="1b9", choices=SHAPES, help="sizes of the model")
    parser.add_argument("--profile", type=Path, help="folder for tables of the kernels and calls of one more iteration")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, choices=(*MODELS, *STAGES),
        help="which attention; summary and distil train KSA's summary parameters alone, the second with a teacher",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, help="iterations that count; unset: 6 at 8k, 4 at 32k, 2 beyond")
    parser.add_argument("--loss-rows", type=int, default=4096, help="tokens whose logits exist at a time")
    parser.add_argument(
        "--kept-logits", type=float, default=3.0, help="GiB of logits that are kept for the backward pass at most"
    )
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a run is given up")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--again", action="store_true", help="measure what is in the results too")
    parser.add_argument("--tiny", action="store_true", help="a model of the same kind that trains on a CPU in seconds")
    parser.add_argument("extra", nargs="*", default=[], help="flags for pretrain_gpt.py, after --")
    options = parser.parse_args()
    if options.report and not options.report.is_file():
        raise UsageError(f"--report {options.report} does not exist")
    return options


def main() -> None:
    """Measure what is missing, write after each run, and report."""
    with usage_errors_exit():
        options = parse_arguments()
        if not 0 < options.limit < math.inf:
            raise UsageError(f"--limit {options.limit:g}: a number of seconds above 0")
        for flag, value in (("lengths", min(options.lengths)), ("loss-rows", options.loss_rows)):
            if value < 1:
                raise UsageError(f"--{flag} {value}: at least 1")
        if options.iterations is not None and options.iterations < 1:
            raise UsageError(f"--iterations {options.iterations}: at least 1")
        check_writable(options.out.parent)
        runs = [] if options.again else stored_runs(options.out)
        if options.profile:
            with writing(options.profile):
                options.profile.mkdir(parents=True, exist_ok=True)
        for length, model, kind in itertools.product(options.lengths, options.models, options.kinds):
            wanted = (model, length, captures(kind, options), options.shape, kind)
            same = [run for run in runs if identity(run) == wanted]
            if any("error" not in run for run in same):
                continue
            print(f"== {model}, {length} tokens, {options.shape}, {kind}{', CUDA graphs' * wanted[2]}", flush=True)
            result = measure(model, length, kind, options)
            print(result.get("error") or f"{result['tokens_per_second']:.0f} tokens/s", flush=True)
            runs = [run for run in runs if run not in same] + [result]
            with whole_file(options.out) as stream:
                stream.write(json.dumps(runs, indent=1) + "\n")
        for line in compare_kinds(runs):
            print(line)
        for line in compare_stages(runs):
            print(line)
        if options.report:
            from report import write_report

            write_report(options.out, options.report)
    sys.exit(any("error" in run for run in runs))


if __name__ == "__main__":
    main()
