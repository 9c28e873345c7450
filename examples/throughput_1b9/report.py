"""Tables of a file of results: tokens/s, memory and MFU of both models, and the parts of an iteration.

    python examples/throughput_1b9/report.py examples/throughput_1b9/results_h100.json docs/results.md

The tables of results.json go into the section `throughput_1b9` of the Markdown file, those of results_h100.json into
`throughput_1b9_h100`.
"""

import json
from pathlib import Path

from megatron_ksa.markdown import replace_section, report_command, table

SECTION = "throughput_1b9"
NAMES = {"ksa": "KSA", "full": "full attention"}


def tables(runs: list[dict]) -> str:
    """Markdown of both tables, and a line that says where and how; runs that failed are left out."""
    done = sorted((run for run in runs if "error" not in run), key=_order)
    if not done:
        return "Not measured yet."
    columns: dict[str, list[str]] = {
        "model": [run.get("shape", "1b9") for run in done],
        "text tokens": [f"{run['length']:,}" for run in done],
        "attention": [NAMES.get(run["model"], run["model"]) for run in done],
        "layers": [_layers(run) for run in done],
        "tokens/s": [f"{run['tokens_per_second']:,.0f}" for run in done],
        "KSA / full": [_ratio(run, done, model="full") if run["model"] == "ksa" else "" for run in done],
        "/ te": [_ratio(run, done, kind="te" + "+graph" * run.get("cuda_graphs", False)) for run in done],
        "peak GiB": [f"{run['peak_gib']:.1f}" for run in done],
        "MFU": [f"{run['mfu'] * 100:.1f} %" if run["mfu"] else "" for run in done],
    }
    # What is the same everywhere, or not there at all, needs no column.
    for name in ("model", "layers", "KSA / full", "/ te"):
        if not any(columns[name]) or (name in ("model", "layers") and set(columns[name]) <= {"1b9", "default"}):
            del columns[name]
    text = [_where(done), table(list(columns), list(zip(*columns.values(), strict=True)))]
    # Inside a CUDA graph, events tell no time.
    timed = [run for run in done if "attention forward" in run["parts_ms"]]
    if timed:
        head = ["text tokens", "attention", "layers", "all", "attention forward", "backward", "output layer, loss",
                "optimizer", "other layers"]  # fmt: skip
        rows = [
            [f"{run['length']:,}", NAMES.get(run["model"], run["model"]), _layers(run),
             *(f"{ms:,.0f}" for ms in _parts(run))]
            for run in timed
        ]  # fmt: skip
        said = (
            "Milliseconds of an iteration by part, without CUDA graphs; with recompute the forward pass counts twice:"
        )
        text += [said, table(head, rows)]
    return "\n\n".join(text)


def _layers(run: dict) -> str:
    """Kind of layers; CUDA graphs are a flag of the run in files of earlier versions."""
    kind = run.get("kind", "default")
    return kind + "+graph" * (bool(run.get("cuda_graphs")) and not kind.endswith("+graph"))


def _order(run: dict) -> tuple:
    """Lengths, then kinds of layers, KSA before what it is compared with."""
    models = list(NAMES)
    place = models.index(run["model"]) if run["model"] in models else len(models)
    kind = run.get("kind", "default")
    return run.get("shape", "1b9"), run["length"], run.get("cuda_graphs", False), kind.startswith("fp8"), kind, place


def _ratio(run: dict, runs: list[dict], **other: str) -> str:
    """Tokens/s over those of the same run with another model or kind of layers, on the same machine."""
    wanted = {name: run.get(name) for name in ("shape", "model", "length", "kind", "cuda_graphs")} | other
    wanted["machine"] = _machine(run)
    for base in runs:
        if all((_machine(base) if name == "machine" else base.get(name)) == value for name, value in wanted.items()):
            return f"{run['tokens_per_second'] / base['tokens_per_second']:.2f}"
    return ""


def _machine(run: dict) -> tuple:
    """What says that two runs can be compared."""
    machine = run["machine"]
    return machine.get("gpu") or machine.get("device"), machine["commit"]


def _parts(run: dict) -> list[float]:
    ms = run["parts_ms"]
    loss = ms["loss forward"] + ms["loss backward"]
    return [run["iteration_ms"], ms["attention forward"], ms["attention backward"], loss, ms["optimizer"], ms["rest"]]


def _where(runs: list[dict]) -> str:
    machine = runs[0]["machine"]
    recomputed = sorted({run["length"] for run in runs if run["recompute"]})
    kernel = sorted({run["attention"]["full attention"] for run in runs if "full attention" in run["attention"]})
    lengths: dict[str, set[int]] = {}
    for run in runs:
        lengths.setdefault(run["machine"]["commit"][:9], set()).add(run["length"])
    commits = [
        commit if len(lengths) == 1 else f"{commit} ({' and '.join(f'{length:,}' for length in sorted(of))} tokens)"
        for commit, of in lengths.items()
    ]
    text = f"One {machine.get('gpu') or machine.get('device')}, torch {machine['torch']}, triton {machine['triton']}, "
    text += f"commit {', '.join(commits)}, bf16, micro-batch 1"
    if kernel:
        text += f", full attention by {', '.join(kernel)}"
    if recomputed:
        text += f", full recompute at {' and '.join(f'{length:,}' for length in recomputed)} tokens"
    return f"{text}; medians of the iterations after the warm-up."


def section(results: Path) -> str:
    """The section that the tables of a file of results have."""
    return SECTION + results.stem.removeprefix("results")


def write_report(results: Path, path: Path) -> None:
    """Put the tables of a file of results into its section of a Markdown file."""
    replace_section(path, section(results), tables(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)
