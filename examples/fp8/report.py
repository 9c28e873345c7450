"""Table and curves of results.json: `report.py results.json README.md`."""

import json
from pathlib import Path

import numpy as np

from megatron_ksa.charts import chart
from megatron_ksa.markdown import replace_section, report_command, table

CURVES = "losses.png"
NAMES = {
    "local": "16 bits, local layers", "te": "16 bits, Transformer Engine", "fp8_delayed": "FP8, delayed",
    "fp8_tensorwise": "FP8, tensorwise", "fp8_blockwise": "FP8, blockwise",
}  # fmt: skip
COLOURS = {
    "local": "#888888", "te": "#222222", "fp8_delayed": "#1b7837", "fp8_tensorwise": "#2166ac",
    "fp8_blockwise": "#d6604d",
}  # fmt: skip
# Steps whose mean loss is compared at the end.
LAST = 20


def deviations(runs: list[dict]) -> list[list[str]]:
    """A row a kind: its last losses, and its deviation from Transformer Engine's 16 bits."""
    base = next((np.array(run["losses"]) for run in runs if run["kind"] == "te" and "losses" in run), None)
    rows = []
    for run in runs:
        if "losses" not in run:
            rows.append([NAMES[run["kind"]], run["error"], "", "", ""])
            continue
        losses, cells = np.array(run["losses"]), ["", ""]
        if base is not None and run["kind"] != "te":
            last = losses[-LAST:].mean() / base[-LAST:].mean() - 1
            cells = [f"{np.abs(losses / base - 1).max() * 100:.2f} %", f"{last * 100:+.2f} %"]
        resumed = f"{run['resumed_deviation']:.1e}" if "resumed_deviation" in run else run.get("error", "")
        rows.append([NAMES[run["kind"]], f"{losses[-LAST:].mean():.4f}", *cells, resumed])
    return rows


def draw(results: dict, output: Path) -> None:
    """Losses of every kind, and their difference from Transformer Engine's 16 bits."""
    runs = [run for run in results["runs"] if "losses" in run]
    base = next((np.array(run["losses"]) for run in runs if run["kind"] == "te"), None)
    with chart(output, rows=2, figsize=(7, 6), sharex=True, layout="constrained") as (_, (above, below)):
        for run in runs:
            losses, steps = np.array(run["losses"]), np.arange(1, len(run["losses"]) + 1)
            above.plot(steps, losses, linewidth=1.2, color=COLOURS[run["kind"]], label=NAMES[run["kind"]])
            if base is not None and run["kind"] != "te":
                below.plot(steps, 100 * (losses / base - 1), linewidth=1, color=COLOURS[run["kind"]])
        above.set(ylabel="loss (nats a byte)")
        above.legend(fontsize=8)
        for bound in (-1, 1):
            below.axhline(bound, color="grey", linestyle=":")
        below.set(xlabel="step", ylabel="from 16 bits (%)")


def write_report(results: Path, path: Path) -> None:
    """Put the table into the section `results` of a Markdown file, and the curves beside the results."""
    measured = json.loads(results.read_text(encoding="utf-8"))
    head = [
        "kind", f"loss, mean of the last {LAST} steps", "largest deviation of a step", "deviation of that mean",
        "resumed halfway, largest relative deviation",
    ]  # fmt: skip
    where = f"{measured['device']}, torch {measured['torch']}, {measured['steps']} steps, {measured['tokens']:,} bytes."
    replace_section(path, "results", f"{where}\n\n{table(head, deviations(measured['runs']))}\n\n![losses]({CURVES})")
    draw(measured, results.with_name(CURVES))


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)
