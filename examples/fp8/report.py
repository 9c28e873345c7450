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
NOISE = "_noise_"
# Steps whose mean loss is compared at the end.
LAST = 20


def deviations(runs: list[dict]) -> list[list[str]]:
    """A row a kind: its first gradient norm, its last losses, and its deviation from Transformer Engine's 16 bits."""
    base = _base(runs)
    rows = []
    for run in runs:
        norm = run.get("first_norm")
        cells = [_name(run["kind"]), "" if norm is None else f"{norm:.3f}"]
        if "losses" not in run:
            rows.append([*cells, run["error"], "", "", ""])
            continue
        losses = np.array(run["losses"])
        cells.append(f"{losses[-LAST:].mean():.4f}")
        if base is not None and run["kind"] != "te":
            cells += [f"{np.abs(losses / base - 1).max() * 100:.2f} %", f"{_last(losses, base):+.2f} %"]
        else:
            cells += ["", ""]
        rows.append([*cells, f"{run['resumed_deviation']:.1e}" if "resumed_deviation" in run else run.get("error", "")])
    return rows


def recipes(runs: list[dict]) -> list[list[str]]:
    """A row a recipe: the deviation of its last losses from those of 16 bits from the same start, over the starts."""
    losses = {run["kind"]: np.array(run["losses"]) for run in runs if "losses" in run}
    rows = []
    for recipe in (kind for kind in NAMES if kind.startswith("fp8")):
        starts = [kind.removeprefix(recipe) for kind in losses if kind.startswith(recipe)]
        found = [_last(losses[f"{recipe}{start}"], losses[f"te{start}"]) for start in starts if f"te{start}" in losses]
        if not found:
            continue
        error = f"{np.std(found, ddof=1) / len(found) ** 0.5:.2f} %" if len(found) > 1 else ""
        rows.append([NAMES[recipe], len(found), f"{np.mean(found):+.2f} %", error])
    return rows


def spread(runs: list[dict]) -> str:
    """How far runs in 16 bits are from each other by chance; empty where there is one of them or none."""
    base, others = _base(runs), [run for run in runs if not run["kind"].startswith("fp8") and run["kind"] != "te"]
    found = [_last(np.array(run["losses"]), base) for run in others if base is not None and "losses" in run]
    if not found:
        return ""
    return (
        f"{len(found) + 1} runs in 16 bits that differ by chance: the last mean is {min(0.0, *found):+.2f} % to "
        f"{max(0.0, *found):+.2f} % from that of Transformer Engine's layers without noise."
    )


def _name(kind: str) -> str:
    base, noise, seed = kind.partition(NOISE)
    return f"{NAMES[base]}, noise {seed}" if noise else NAMES[base]


def _base(runs: list[dict]) -> np.ndarray | None:
    return next((np.array(run["losses"]) for run in runs if run["kind"] == "te" and "losses" in run), None)


def _last(losses: np.ndarray, base: np.ndarray) -> float:
    """Per cent by which the mean of the last losses is above that of `base`."""
    return float(100 * (losses[-LAST:].mean() / base[-LAST:].mean() - 1))


def draw(results: dict, output: Path) -> None:
    """Losses of every kind, and their difference from Transformer Engine's 16 bits."""
    runs = [run for run in results["runs"] if "losses" in run]
    base = _base(runs)
    with chart(output, rows=2, figsize=(7, 6), sharex=True, layout="constrained") as (_, (above, below)):
        for run in runs:
            losses, steps = np.array(run["losses"]), np.arange(1, len(run["losses"]) + 1)
            kind, noise, _ = run["kind"].partition(NOISE)
            look = {"color": COLOURS[kind], "alpha": 0.4 if noise else 1}
            above.plot(steps, losses, linewidth=1.2, label=None if noise else NAMES[kind], **look)
            if base is not None and run["kind"] != "te":
                below.plot(steps, 100 * (losses / base - 1), linewidth=1, **look)
        above.set(ylabel="loss (nats a byte)")
        above.legend(fontsize=8)
        for bound in (-1, 1):
            below.axhline(bound, color="grey", linestyle=":")
        below.set(xlabel="step", ylabel="from 16 bits (%)")


def write_report(results: Path, path: Path) -> None:
    """Put the table into the section `results` of a Markdown file, and the curves beside the results."""
    measured = json.loads(results.read_text(encoding="utf-8"))
    head = [
        "kind", "first gradient norm", f"loss, mean of the last {LAST} steps", "largest deviation of a step",
        "deviation of that mean", "resumed halfway, largest relative deviation",
    ]  # fmt: skip
    runs = measured["runs"]
    where = (
        f"{measured['device']}, torch {measured['torch']}, {measured['steps']} steps, learning rate {measured['lr']}, "
        f"{measured['tokens']:,} bytes."
    )
    of_recipes = table(["recipe", "starts", "mean deviation from 16 bits", "standard error"], recipes(runs))
    parts = [where, of_recipes, table(head, deviations(runs)), spread(runs), f"![losses]({CURVES}) (faint: with noise)"]
    replace_section(path, "results", "\n\n".join(part for part in parts if part))
    draw(measured, results.with_name(CURVES))


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)
