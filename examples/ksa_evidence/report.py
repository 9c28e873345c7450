"""Tables and chart of results.json: `report.py results.json README.md`."""

import json
import math
from pathlib import Path

import numpy as np

from megatron_ksa.charts import chart, draw_seeds
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import cell, replace_section, report_command, table

CHART = "needles.png"
OVERVIEW = Path(__file__).parents[2] / "docs" / "results.md"
COLOURS = {
    "full": "#222222",
    "3:1 window": "#e08214",
    "3:1 KSA": "#1b7837",
    "3:1 KSA, distilled": "#762a83",
    "window": "#d6604d",
    "KSA": "#2166ac",
}


def arms_of(runs: list[dict], part: str, stage: str) -> dict[str, list[dict]]:
    """Runs of each arm after a stage, one a seed, in the order of the arms."""
    found: dict[str, list[dict]] = {}
    for run in runs:
        if (run["part"], run["stage"]) == (part, stage):
            found.setdefault(run["arm"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: list(COLOURS).index(item[0])))


def distance(row: dict) -> int:
    """Tokens between needle and question of a needle score."""
    return round((1 - row["depth"]) * row["length"])


def needles(run: dict, far: int, form: str | None = None) -> float:
    """Share of values found at a distance, mean of the forms."""
    return float(np.mean([r["values"] for r in run["needles"] if distance(r) == far and form in (None, r["form"])]))


def needle_table(arms: dict[str, list[dict]], window: int) -> str:
    """Values found by distance; distances within the window of one layer are marked."""
    distances = sorted({distance(row) for runs in arms.values() for run in runs for row in run["needles"]})
    head = ["arm", *(f"{far:,}{' (window)' if far <= window else ''}" for far in distances)]
    rows = [[arm, *(cell([needles(run, far) for run in runs], 100) for far in distances)] for arm, runs in arms.items()]
    return table(head, rows)


def form_table(arms: dict[str, list[dict]], beyond: int) -> str:
    """Values found beyond the window by form, mean of these distances."""
    forms = list(dict.fromkeys(row["form"] for runs in arms.values() for run in runs for row in run["needles"]))

    def score(run: dict, form: str) -> float:
        return float(np.mean([r["values"] for r in run["needles"] if distance(r) > beyond and r["form"] == form]))

    rows = [[arm, *(cell([score(run, form) for run in runs], 100) for form in forms)] for arm, runs in arms.items()]
    return table(["arm", *forms], rows)


def perplexity_table(arms: dict[str, list[dict]], name: str) -> str:
    """Perplexity by context length, the same scored tokens at each."""
    lengths = sorted({row["length"] for runs in arms.values() for run in runs for row in run[name]})

    def at(run: dict, length: int) -> float:
        return math.exp(next(row["loss"] for row in run[name] if row["length"] == length))

    rows = [[arm, *(cell([at(run, length) for run in runs], 1, 3) for length in lengths)] for arm, runs in arms.items()]
    return table(["arm", *(f"{length:,}" for length in lengths)], rows)


def cost_table(arms: dict[str, list[dict]], settings: dict) -> str:
    """K/V bytes a token in bfloat16, at the length of the runs."""
    rows = [[arm, bytes_a_token(runs[0], settings)] for arm, runs in arms.items()]
    return table(["arm", "K/V bytes a token"], rows)


def bytes_a_token(run: dict, settings: dict) -> str:
    """K/V bytes a token in bfloat16, at the length of the run."""
    return f"{run['kv_rows'] * 2 * 2 * settings['heads'] * 64 / run['length']:,.0f}"


def section(runs: list[dict], settings: dict, part: str, stage: str, title: str) -> list[str]:
    """Title and tables of one part of the experiment."""
    arms = arms_of(runs, part, stage)
    if not arms:
        return []
    window = settings["window"] * settings["chunk"]
    seeds = ", ".join(f"{arm} {len(of_arm)}" for arm, of_arm in arms.items())
    parts = [
        f"### {title}", f"Seeds measured: {seeds}.",
        "Needles, values found (%), mean of four forms, by tokens between needle and question; a layer's window "
        f"reaches {window} tokens:",
        needle_table(arms, window), "By form, mean of the distances beyond the window:", form_table(arms, window),
        "Perplexity by context length, synthetic text held out:", perplexity_table(arms, "perplexity"),
    ]  # fmt: skip
    if all("code" in run for of_arm in arms.values() for run in of_arm):
        parts += ["Perplexity by context length, code held out:", perplexity_table(arms, "code")]
    return [*parts, cost_table(arms, settings)]


SECTIONS = (
    ("scratch", "trained", "From scratch, equal tokens"),
    ("dense", "distil", "From dense: after distillation alone"),
    ("dense", "trained", "From dense, equal tokens"),
    ("dense", "extended", "From dense, then at twice the length"),
)


def text_of(results: dict) -> str:
    """All tables; each cell is the mean over seeds ± half their range."""
    settings, machine = results["settings"], results["machine"]
    head = (
        f"Measured on {machine['device']} (torch {machine['torch']}, triton {machine['triton']}, commit "
        f"{machine['commit']}): "
        f"{settings['layers']} layers of {settings['heads']} heads of 64, C {settings['chunk']}, S "
        f"{settings['summaries']}, W "
        f"{settings['window']}, {settings['length']:,} tokens; from scratch {settings['steps']:,} iterations of "
        f"{settings['batch_tokens']:,} tokens at a learning rate of {settings['lr']:g}; from dense "
        f"{settings['dense_steps']:,} "
        f"(distillation {settings['distil_steps']:,} of them) and {settings['extend_steps']:,} at twice the length. "
        "Mean over "
        f"seeds ± half their range."
    )
    return "\n\n".join([head, *(part for each in SECTIONS for part in section(results["runs"], settings, *each))])


def overview(results: dict) -> str:
    """Needles of the models from scratch at four distances, and what a token costs in the cache."""
    settings, arms = results["settings"], arms_of(results["runs"], "scratch", "trained")
    distances = sorted({distance(row) for runs in arms.values() for run in runs for row in run["needles"]})
    window = settings["window"] * settings["chunk"]
    # Inside the window, beyond it, far beyond it, and the largest.
    wanted = (window / 2, 2 * window, 8 * window, distances[-1])
    shown = [min(distances, key=lambda far: abs(far - near)) for near in wanted]
    rows = [
        [arm, bytes_a_token(runs[0], settings), *(cell([needles(run, far) for run in runs], 100) for far in shown)]
        for arm, runs in arms.items()
    ]
    return table(["model", "K/V bytes a token", *(f"{far:,}" for far in shown)], rows)


def plot(results: dict, output: Path) -> None:
    """Needles found against distance, a line an arm, one panel a part."""
    parts = [(part, stage, title) for part, stage, title in SECTIONS if arms_of(results["runs"], part, stage)]
    settings, size = results["settings"], (4.6 * len(parts), 3.6)
    with chart(output, columns=len(parts), figsize=size, squeeze=False, sharey=True, layout="constrained") as (_, axes):
        for axis, (part, stage, title) in zip(axes[0], parts, strict=True):
            for arm, runs in arms_of(results["runs"], part, stage).items():
                distances = sorted({distance(row) for run in runs for row in run["needles"]})
                scores = np.array([[100 * needles(run, far) for far in distances] for run in runs])
                draw_seeds(axis, distances, scores.T, arm, COLOURS[arm])
            axis.axvline(settings["window"] * settings["chunk"], color="grey", linestyle=":")
            axis.set(xscale="log", ylim=(-3, 103), title=title, xlabel="tokens between needle and question")
            axis.legend(fontsize=7, loc="lower left")
        axes[0][0].set_ylabel("values found (%), bold: mean of the seeds")


def write_beside(results: Path) -> str:
    """Write the tables into results.md and the chart into needles.png, both beside `results`; return the tables."""
    found = json.loads(results.read_text(encoding="utf-8"))
    text = text_of(found)
    with whole_file(results.with_suffix(".md")) as stream:
        stream.write(text + "\n")
    plot(found, results.with_name(CHART))
    return text


def write_report(results: Path, output: Path) -> None:
    """Write tables into the section `results` of `output`, the chart beside `results`, and the overview into docs/."""
    found = json.loads(results.read_text(encoding="utf-8"))
    replace_section(output, "results", text_of(found))
    replace_section(OVERVIEW, "ksa_evidence", overview(found))
    plot(found, results.with_name(CHART))


if __name__ == "__main__":
    report_command(__doc__, "experiment.py", write_report)
