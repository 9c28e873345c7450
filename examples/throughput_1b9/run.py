"""Throughput of the KSA report's 1.9B model, on one GPU or several: KSA against the same model with full attention.

    python examples/throughput_1b9/run.py --out examples/throughput_1b9/results_h100.json --report docs/results.md
    python examples/throughput_1b9/run.py --models ksa summary distil --lengths 8192 32768 --out distil.json
    python examples/throughput_1b9/run.py --models ksa --lengths 8192 --kinds local te fp8_delayed fp8_delayed+graph
    python examples/throughput_1b9/run.py --shape 8b_8layers --models ksa --lengths 8192 --kinds te fp8_tensorwise

Each length and model trains a few iterations through `pretrain_gpt.py` in a process of its own, on generated tokens,
without saving. Results are written after each; a second call goes on with those that are missing or failed.

    python examples/throughput_1b9/run.py --layouts cp4 cp4-a2a tp2-cp2 cp2 one --lengths 131072 --out several.json

Layouts of as many GPUs run one after the other in one set of ranks, with the communication of one iteration profiled.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
import report
import report_ranks
from layouts import parse_layout
from runs import KINDS, LAYERS, LENGTHS, MODELS, SHAPES, STAGES, Run, captures, iterations, training_flags

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import check_writable, whole_file, writing
from megatron_ksa.markdown import check_section
from megatron_ksa.platform.ranks import run_ranks
from megatron_ksa.results import stored_runs

HERE = Path(__file__).parent
# Seconds after which ranks have imported everything; last characters of its output that a failed launch leaves.
START_SECONDS, LOG = 60, 100_000
# With less time left of `--seconds`, no run is started.
SHORTEST = 20


def measure(model: str, length: int, kind: str, options: argparse.Namespace) -> dict:
    """Train and return what `timed_pretrain.py` wrote, or what went wrong."""
    name = f"{options.shape}-{model}-{length}-{kind}"
    record = options.out.with_suffix(f".{name}.part")
    flags = training_flags(model, length, kind, options)
    warm_up, measured = iterations(length, kind, options)
    command = [sys.executable, str(HERE / "timed_pretrain.py"), str(record), str(warm_up), str(measured)]
    command += [str(options.profile / f"{name}.txt") if options.profile else "-", *flags]
    result = run_recorded(command, record, min(options.limit, left_of(options)))
    name_commit(result, options.commit)
    run = {"model": model, "length": length, "cuda_graphs": captures(kind, options)}
    if (options.shape, kind) != ("1b9", "default"):
        run |= {"shape": options.shape, "kind": kind}
    return {**result, **run}


def name_commit(result: dict, commit: str | None) -> None:
    """Put a commit that was given into a result: git did not know it, nor what has changed since."""
    if commit and "machine" in result:
        result["machine"] |= {"commit": commit, "kernels_changed_since": None}


def left_of(options: argparse.Namespace) -> float:
    """Seconds of `--seconds` that are left."""
    return options.end - time.monotonic()


def run_recorded(command: list[str], record: Path, limit: float) -> dict:
    """What a process wrote to `record`, and under "error" why it did not end well within `limit` seconds."""
    record.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command, timeout=limit, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        )  # fmt: skip
        failure = None if done.returncode == 0 and record.exists() else reason(done.stderr)
    except subprocess.TimeoutExpired:
        failure = f"not done after {limit:.0f} s"
    result = json.loads(record.read_text()) if record.exists() else {}
    record.unlink(missing_ok=True)
    return result if failure is None else {**result, "error": failure}


def measure_ranks(runs: list[Run], options: argparse.Namespace) -> Iterator[dict]:
    """Train runs that take the same number of GPUs in turn, in one set of ranks, and yield the result of each.

    Where a run fails, the runs after it go on in a new set. A run that an earlier call left complete is not repeated.
    """
    left = list(runs)
    for run in runs:
        result = _result(run, _record(run, options), options)
        if result.get("complete") and not options.again:
            left.remove(run)
            yield result
    while left and left_of(options) > SHORTEST:
        records = [_record(run, options) for run in left]
        description = []
        for run, record in zip(left, records, strict=True):
            warm_up, measured = iterations(run.length, run.kind, options, ranks=True)
            flags = training_flags(run.model, run.length, run.kind, options, run.layout)
            description.append(
                {"record": str(record), "warm_up": warm_up, "iterations": warm_up + measured + 1, "flags": flags}
            )
        stderr = _train_ranks(description, left[0].layout.gpus, options)
        for record in records:
            run = left.pop(0)
            result = _result(run, record, options)
            if not result.get("complete"):
                yield result | {"error": reason(stderr)}
                break
            yield result


def _record(run: Run, options: argparse.Namespace) -> Path:
    """Where the ranks write what they measure."""
    name = f"{options.shape}-{run.model}-{run.length}-{run.kind}-{run.layout.name}"
    return options.out.with_suffix(f".{name}.part")


def _result(run: Run, record: Path, options: argparse.Namespace) -> dict:
    """What the ranks have written of a run, with what it was; the file is removed."""
    result = json.loads(record.read_text()) if record.exists() else {}
    record.unlink(missing_ok=True)
    name_commit(result, options.commit)
    return result | {
        "model": run.model, "length": run.length, "cuda_graphs": captures(run.kind, options),
        "layout": run.layout.name, "gpus": run.layout.gpus, "shape": options.shape, "kind": run.kind,
    }  # fmt: skip


def _train_ranks(description: list[dict], gpus: int, options: argparse.Namespace) -> str:
    """Run `timed_ranks.py`; what it said on stderr."""
    file = options.out.with_suffix(".runs")
    file.write_text(json.dumps(description))
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if gpus > 1:
        # Tensor and context parallelism want it before CUDA starts.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    seconds = min(START_SECONDS + options.limit * len(description), left_of(options))
    script = [str(HERE / "timed_ranks.py"), str(file), str(options.limit)]
    done = run_ranks(script, gpus, seconds=seconds, environment=environment)
    file.unlink()
    if done.returncode:
        options.out.with_suffix(f".{gpus}.log").write_text(done.stdout[-LOG:] + done.stderr[-LOG:])
    return done.stderr


def reason(stderr: str) -> str:
    """The line that says what went wrong; all of it goes to this process's stderr."""
    print(stderr[-6000:], file=sys.stderr)
    lines = [line for line in stderr.splitlines() if "Error" in line or line.startswith("error:")]
    return (lines or ["it ended without a result"])[-1].strip()[:300]


def identity(run: dict) -> tuple:
    """What two runs of the same measurement have in common."""
    return (
        run.get("model"), run.get("length"), run.get("cuda_graphs", False), run.get("shape", "1b9"),
        run.get("kind", "default"), run.get("layout"),
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
    parser.add_argument(
        "--layouts", nargs="+", type=parse_layout, metavar="LAYOUT",
        help="one, cp4, cp4-a2a, tp2-cp2, cp2-fit (recompute to fit 80 GB) and the like: several GPUs, "
        "in ranks that this script starts",
    )  # fmt: skip
    parser.add_argument(
        "--full-layouts", nargs="*", type=parse_layout, metavar="LAYOUT",
        help="of the layouts, those that full attention is measured in; unset: all",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, help="iterations that count; unset: 6 at 8k, 4 at 32k, 2 beyond")
    parser.add_argument("--loss-rows", type=int, default=4096, help="tokens whose logits exist at a time")
    parser.add_argument(
        "--kept-logits", type=float, default=3.0, help="GiB of logits that are kept for the backward pass at most"
    )
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a run is given up")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="seconds after which nothing is started, and what runs is ended"
    )
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--again", action="store_true", help="measure what is in the results too")
    parser.add_argument("--tiny", action="store_true", help="a model of the same kind that trains on a CPU in seconds")
    parser.add_argument("extra", nargs="*", default=[], help="flags for pretrain_gpt.py, after --")
    options = parser.parse_args()
    if options.report:
        check_section(options.report, report.section(options.out) if options.layouts is None else report_ranks.SECTION)
    return options


def wanted(options: argparse.Namespace, runs: list[dict]) -> list[Run]:
    """The runs that the results lack; in layouts of several GPUs all of one model come before the next model's."""
    found = {identity(run) for run in runs if "error" not in run}
    every = list(itertools.product(options.layouts or [None], options.lengths, options.models, options.kinds))
    if options.layouts:
        every.sort(key=lambda run: options.models.index(run[2]))
    return [
        Run(model, length, kind, layout)
        for layout, length, model, kind in every
        if not (model == "full" and options.full_layouts is not None and layout not in options.full_layouts)
        and (model, length, captures(kind, options), options.shape, kind, layout and layout.name) not in found
    ]


def results(options: argparse.Namespace, left: list[Run]) -> Iterator[dict]:
    """Measure the runs in order, neighbours that take the same number of GPUs together."""
    for gpus, neighbours in itertools.groupby(left, lambda run: run.layout and run.layout.gpus):
        same = list(neighbours)
        for model, length, kind, layout in same:
            graphs = ", CUDA graphs" * captures(kind, options)
            where = f", {layout.name}" if layout else ""
            if left_of(options) < SHORTEST:
                print(f"-- the {options.seconds:.0f} s of --seconds are over: a second call goes on", flush=True)
                return
            print(f"== {model}, {length} tokens, {options.shape}, {kind}{where}{graphs}", flush=True)
            if gpus is None:
                yield measure(model, length, kind, options)
        if gpus is not None:
            yield from measure_ranks(same, options)


def main() -> None:
    """Measure what is missing, write after each run, and report."""
    with usage_errors_exit():
        options = parse_arguments()
        for flag in ("limit", "seconds"):
            if not (value := getattr(options, flag)) > 0 or (flag == "limit" and value == math.inf):
                raise UsageError(f"--{flag} {value:g}: a number of seconds above 0")
        options.end = time.monotonic() + options.seconds
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
        failed = False
        for result in results(options, wanted(options, runs)):
            failed |= "error" in result
            said = result.get("error") or f"{result['tokens_per_second']:.0f} tokens/s"
            print(said if options.layouts is None else f"{result['layout']}, {result['model']}: {said}", flush=True)
            runs = [run for run in runs if identity(run) != identity(result)] + [result]
            with whole_file(options.out) as stream:
                stream.write(json.dumps(runs, indent=1) + "\n")
        failed |= bool(wanted(options, runs))
        for line in compare_kinds(runs) if options.layouts is None else ():
            print(line)
        for line in compare_stages(runs):
            print(line)
        if options.report:
            writer = report if options.layouts is None else report_ranks
            writer.write_report(options.out, options.report)
    sys.exit(failed)


if __name__ == "__main__":
    main()
