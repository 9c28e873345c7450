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
    """Markdown of both tables, and a line that says where and how."""
    measured = [run for run in runs if "error" not in run]
    if measured and all("kind" in run for run in measured):
        return kind_table(measured)
    done = {(run["length"], run.get("cuda_graphs", False), run["model"]): run for run in measured if "kind" not in run}
    if not done:
        return "Not measured yet."
    summary, parts = [], []
    for length, graphs in sorted({kind[:2] for kind in done}):
        full = done.get((length, graphs, "full"))
        for model in NAMES:
            run = done.get((length, graphs, model))
            if run is None:
                continue
            name = NAMES[model] + ", CUDA graph" * graphs
            ratio = run["tokens_per_second"] / full["tokens_per_second"] if full and model == "ksa" else None
            mfu = run["mfu"]
            summary.append([
                f"{length:,}", name, f"{run['tokens_per_second']:,.0f}", f"{ratio:.2f}" if ratio else "",
                f"{run['peak_gib']:.1f}", f"{mfu * 100:.1f} %" if mfu else "",
            ])  # fmt: skip
            if not graphs:
                parts.append([f"{length:,}", name, *(f"{ms:,.0f}" for ms in _parts(run))])
    return "\n\n".join([
        _where(list(done.values())),
        table(["text tokens", "attention", "tokens/s", "KSA / full", "peak GiB", "MFU"], summary),
        "Milliseconds of an iteration by part, without CUDA graphs; with recompute the forward pass counts twice:",
        table(
            ["text tokens", "attention", "all", "attention forward", "backward", "output layer, loss", "optimizer",
             "other layers"], parts,
        ),
    ])  # fmt: skip


def kind_table(runs: list[dict]) -> str:
    """Markdown of runs of several kinds of layers and precision, each beside the bf16 run of Transformer Engine."""
    rows = []
    for run in runs:
        same = [other for other in runs if all(other[name] == run[name] for name in ("shape", "model", "length"))]
        base = next((other for other in same if other["kind"] == "te" + "+graph" * run["cuda_graphs"]), None)
        ratio = f"{run['tokens_per_second'] / base['tokens_per_second']:.2f}" if base else ""
        mfu = f"{run['mfu'] * 100:.1f} %" if run["mfu"] else ""
        rows.append([
            run["shape"], f"{run['length']:,}", NAMES.get(run["model"], run["model"]), run["kind"],
            f"{run['tokens_per_second']:,.0f}", ratio, f"{run['peak_gib']:.1f}", mfu,
        ])  # fmt: skip
    head = ["model", "text tokens", "attention", "layers", "tokens/s", "/ te", "peak GiB", "MFU"]
    return f"{_where(runs)}\n\n{table(head, rows)}"


def _parts(run: dict) -> list[float]:
    ms = run["parts_ms"]
    loss = ms["loss forward"] + ms["loss backward"]
    return [run["iteration_ms"], ms["attention forward"], ms["attention backward"], loss, ms["optimizer"], ms["rest"]]


def _where(runs: list[dict]) -> str:
    machine = runs[0]["machine"]
    recomputed = sorted({run["length"] for run in runs if run["recompute"]})
    kernel = sorted({run["attention"]["full attention"] for run in runs if "full attention" in run["attention"]})
    text = f"One {machine.get('gpu') or machine.get('device')}, torch {machine['torch']}, triton {machine['triton']}, "
    text += f"commit {machine['commit'][:9]}, bf16, micro-batch 1"
    if kernel:
        text += f", full attention by {', '.join(kernel)}"
    if recomputed:
        text += f", full recompute at {' and '.join(f'{length:,}' for length in recomputed)} tokens"
    return f"{text}; medians of the iterations after the warm-up."


def write_report(results: Path, path: Path) -> None:
    """Put the tables of a file of results into its section of a Markdown file."""
    runs = json.loads(results.read_text(encoding="utf-8"))
    replace_section(path, SECTION + results.stem.removeprefix("results"), tables(runs))


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)
