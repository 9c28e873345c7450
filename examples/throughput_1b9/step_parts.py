"""Parts of a training step of the 1.9B model on one GPU: what each takes, its floor, and what each change brings.

    python examples/throughput_1b9/step_parts.py --lengths 131072 --variants before all
    python examples/throughput_1b9/step_parts.py --out step_parts_h100.json --report docs/results.md

Each length and model runs in a process of its own, in which the variants of the step take turns. Results are written
after each; a second call goes on with those that are missing or failed. The tables of step_parts_h100.json go into the
section `step_parts_h100` of the Markdown file.
"""

import argparse
import json
import sys
from pathlib import Path

from run import HERE, name_commit, run_recorded
from runs import training_flags

from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import check_section, replace_section, table

SECTION = "step_parts"
# Iterations that count of each variant and round, by length.
MEASURED = {8192: 3, 32768: 1}
NAMES = {"ksa": "KSA", "full": "full attention"}
CHANGES = {
    "before": "none of these", "norm": "norm beside the residual", "activation": "SwiGLU without torch.compile",
    "residual": "residual sum without torch.compile", "optimizer": "optimizer in one pass",
    "gradients": "first products overwrite", "logits": "logits kept, in one chunk",
    "embedding": "gradient of the embedding by rows", "checks": "checks for NaN once an iteration",
    "all": "all of these", "all, unchecked": "all, losses and gradients not checked for NaN",
}  # fmt: skip
ORDER = (
    "products of the layers", "products of the output layer", "attention", "optimizer", "activation", "norms",
    "rotation", "residual", "loss", "embedding", "sums of gradients in float32", "zeros",
    "check of gradients", "copies", "other",
)  # fmt: skip


def measure(model: str, length: int, options: argparse.Namespace) -> dict:
    """Train and return what `step_parts_pretrain.py` wrote, or what went wrong."""
    from step_parts_pretrain import plan

    names = options.variants or list(CHANGES)
    measured = options.measured or MEASURED.get(length, 1)
    flags = training_flags(model, length, "local", options)
    flags[flags.index("--train-iters") + 1] = str(len(plan(measured, names)))
    for flag in ("--loss-chunk-rows", "--loss-kept-logits"):
        # The variants' own.
        place = flags.index(flag)
        del flags[place : place + 2]
    record = options.out.with_suffix(f".{model}-{length}.part")
    command = [
        sys.executable,
        str(HERE / "step_parts_pretrain.py"),
        str(record),
        str(measured),
        ";".join(names),
        *flags,
    ]
    result = run_recorded(command, record, options.limit)
    name_commit(result, options.commit)
    return {**result, "model": model, "length": length}


def tables(runs: list[dict]) -> str:
    """Markdown of the runs that timed every variant equally often, and parts of those that ended."""
    timed = sorted(filter(_is_timed, runs), key=lambda run: (run["length"], run["model"] != "ksa"))
    done = [run for run in timed if "profiles" in run]
    if not done:
        return "Not measured yet."
    notes = [run["note"] for run in timed if "note" in run]
    texts = [" ".join([_where(done[0]), *notes]), _changes(timed)]
    for run in done:
        if "all" in run["profiles"]:
            texts += [_rates(run), _parts(run)]
    return "\n\n".join(texts)


def _is_timed(run: dict) -> bool:
    """Whether all variants had the same number of turns: one that had its turns late may have met another clock."""
    counts = {len(times) for times in run.get("times_ms", {}).values()}
    return len(counts) == 1 and counts != {0}


def _where(run: dict) -> str:
    machine = run["machine"]
    return (
        f"One {machine.get('gpu') or machine.get('device')}, torch {machine['torch']}, triton {machine['triton']}, "
        f"commit {machine['commit'][:9]}. Variants take turns in one process; medians."
    )


def _rates(run: dict) -> str:
    """The line above the parts of a run, with the rates behind its floors."""
    return (
        f"{NAMES[run['model']]}, {run['length']:,} tokens, milliseconds of a step; a copy moves "
        f"{run['copy_bytes_per_ms'] / 1e9:.2f} TB/s, the fastest product computes "
        f"{run['fastest_flops_per_ms'] / 1e9:.0f} TFLOP/s:"
    )


def _changes(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        times = run["iteration_ms"]
        for name in (name for name in CHANGES if name in times):
            mfu = run.get("mfu", {}).get(name)
            saved = times["before"] - times[name] if "before" in times else 0.0
            rows.append([
                f"{run['length']:,}", NAMES[run["model"]], CHANGES[name], f"{times[name]:,.1f}", f"{saved:,.1f}",
                f"{run['length'] / times[name] * 1e3:,.0f}", f"{mfu * 100:.1f} %" if mfu else "",
                f"{run['peak_gib'][name]:.1f}",
            ])  # fmt: skip
    columns = ["text tokens", "attention", "changes", "ms", "saved", "tokens/s", "MFU", "peak GiB"]
    return table(columns, rows)


def _parts(run: dict) -> str:
    """Each part before and after, floors and gaps; the rest is time in which the device runs nothing."""
    after, before = run["profiles"]["all"], run["profiles"].get("before")
    rows = []
    found = [*after["parts"], *(before["parts"] if before else ())]
    for name in sorted(set(found), key=lambda part: ORDER.index(part) if part in ORDER else len(ORDER)):
        empty = {"ms": 0.0, "floor_ms": 0.0, "kernels": 0}
        part = after["parts"].get(name, empty)
        was = before["parts"].get(name, empty)["ms"] if before else None
        rows.append([
            name, "" if was is None else f"{was:.2f}", f"{part['ms']:.2f}", f"{part['floor_ms']:.2f}",
            f"{part['ms'] - part['floor_ms']:.2f}", part["kernels"],
        ])  # fmt: skip
    busy_before = f"{before['busy_ms']:.2f}" if before else ""
    rows.append(["any kernel runs", busy_before, f"{after['busy_ms']:.2f}", "", "", ""])
    idle = run["iteration_ms"]["all"] - after["busy_ms"]
    idle_before = f"{run['iteration_ms']['before'] - before['busy_ms']:.2f}" if before else ""
    rows.append(["no kernel runs", idle_before, f"{idle:.2f}", "0.00", f"{idle:.2f}", ""])
    return table(["part", "before", "after", "floor", "gap", "kernels"], rows)


def section(results: Path) -> str:
    """The section that the tables of a file of results have."""
    return SECTION + results.stem.removeprefix(SECTION)


def write_report(results: Path, path: Path) -> None:
    """Put the tables of a file of results into its section of a Markdown file."""
    replace_section(path, section(results), tables(json.loads(results.read_text(encoding="utf-8"))))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "step_parts.json", help="results, read and added to")
    parser.add_argument("--report", type=Path, help="Markdown file with a section named as the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="text tokens of a sequence")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES, help="which attention")
    parser.add_argument("--variants", nargs="+", choices=CHANGES, help="which changes; unset: every one")
    parser.add_argument("--measured", type=int, help="iterations of a variant in each of two rounds; unset: by length")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a run is given up")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--again", action="store_true", help="measure what is in the results too")
    parser.add_argument("--tiny", action="store_true", help="a model of the same kind that trains on a CPU in seconds")
    parser.add_argument("extra", nargs="*", default=[], help="flags for pretrain_gpt.py, after --")
    # What `training_flags` asks for beside these.
    parser.set_defaults(cuda_graphs=False, loss_rows=0, kept_logits=0, iterations=1, shape="1b9", profile=None)
    options = parser.parse_args()
    if options.report:
        check_section(options.report, section(options.out))
    return options


def main() -> None:
    """Measure what is missing, write after each run, and report."""
    with usage_errors_exit():
        options = parse_arguments()
        runs = json.loads(options.out.read_text()) if options.out.exists() and not options.again else []
        for length in options.lengths:
            for model in options.models:
                same = [run for run in runs if (run["model"], run["length"]) == (model, length)]
                if any("profiles" in run for run in same):
                    continue
                print(f"== {model}, {length} tokens", flush=True)
                result = measure(model, length, options)
                print(result.get("error") or result["iteration_ms"], flush=True)
                runs = [run for run in runs if run not in same] + [result]
                with whole_file(options.out) as stream:
                    stream.write(json.dumps(runs, indent=1) + "\n")
        print(tables(runs), flush=True)
        if options.report:
            write_report(options.out, options.report)
    sys.exit(any("profiles" not in run for run in runs))


if __name__ == "__main__":
    main()
