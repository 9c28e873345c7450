"""Tables and a chart of an experiment's results.json, written between the marks of a Markdown file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.charts import chart, draw_seeds
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import cell, replace_section, report_command, table

BEFORE = "before extension"


@dataclass(frozen=True)
class Compared:
    """The runs of an experiment that are compared: the same tokens for each.

    Attributes:
        runs: before extension, and after as many iterations as all measured seeds of all arms have.
        steps: these iterations.
        arms: in the order of the tables.
        lengths: context lengths, in tokens.
    """

    runs: list[dict]
    steps: int
    arms: list[str]
    lengths: list[int]

    @classmethod
    def of(cls, results: dict) -> "Compared":
        """From results.json."""
        reached: dict[tuple[int, str], set[int]] = {}
        for run in results["runs"]:
            if run["steps"]:
                reached.setdefault((run["seed"], run["arm"]), set()).add(run["steps"])
        steps = max(set.intersection(*reached.values()) if reached else set(), default=0)
        runs = [run for run in results["runs"] if run["steps"] in (0, steps)]
        arms = sorted({run["arm"] for run in runs}, key=lambda arm: (arm != BEFORE, arm))
        return cls(runs, steps, arms, sorted({row["length"] for run in runs for row in run["perplexity"]}))

    def needles(self, arm: str, length: int | None = None, form: str | None = None) -> list[float]:
        """Share of values found, mean of the forms and lengths that are not given; one a seed."""
        wanted = {"length": length, "form": form}
        return [
            float(np.mean([r["values"] for r in run["needles"] if all(v in (None, r[k]) for k, v in wanted.items())]))
            for run in self.runs
            if run["arm"] == arm
        ]

    def perplexity(self, arm: str, length: int) -> list[float]:
        """One a seed."""
        rows = [row for run in self.runs if run["arm"] == arm for row in run["perplexity"]]
        return [math.exp(row["loss"]) for row in rows if row["length"] == length]


def tables(results: dict) -> str:
    """Needle and perplexity tables in Markdown; each cell is the mean over seeds ± half their range."""
    found, settings = Compared.of(results), results["settings"]
    forms = list(dict.fromkeys(row["form"] for run in found.runs for row in run["needles"]))
    head = ["arm", *(f"{length:,}" for length in found.lengths)]
    seeds = {arm: len({run["seed"] for run in found.runs if run["arm"] == arm}) for arm in found.arms}
    label = {arm: f"{arm} ({count} seed{'s' if count > 1 else ''})" for arm, count in seeds.items()}
    by_length = [
        [
            label[arm],
            *(cell(found.needles(arm, length), 100) for length in found.lengths),
            cell(found.needles(arm), 100),
        ]
        for arm in found.arms
    ]
    longest = found.lengths[-1]
    by_form = [[form, *(cell(found.needles(arm, longest, form), 100) for arm in found.arms)] for form in forms]
    by_context = [
        [label[arm], *(cell(found.perplexity(arm, length), digits=3) for length in found.lengths)] for arm in found.arms
    ]
    return "\n\n".join(
        [
            f"Measured on {results['machine']['device']}: {settings['layers']} layers of {settings['heads']} heads, "
            f"{settings['pretrain_steps']} "
            f"iterations at {settings['pretrain_length']} tokens, then {found.steps} at {settings['target_length']}, "
            f"{settings['batch_tokens']:,} tokens an iteration; mean ± half the range over seeds.",
            "Needle tests, values found (%), mean of the eight forms, by context length (tokens):",
            table([*head, "mean"], by_length),
            f"By form, at {longest:,} tokens:",
            table(["form", *found.arms], by_form),
            "Perplexity by context length (tokens), the same scored tokens at each:",
            table(head, by_context),
        ]
    )


def plot(results: dict, output: Path) -> None:
    """Needles found and perplexity against context length, a line an arm: bold the mean, thin each seed."""
    found = Compared.of(results)
    with chart(output, columns=2, figsize=(9.2, 3.6), layout="constrained") as (_, (left, right)):
        for arm in found.arms:
            shares = 100 * np.array([found.needles(arm, length) for length in found.lengths])
            perplexities = np.array([found.perplexity(arm, length) for length in found.lengths])
            for axis, values in ((left, shares), (right, perplexities)):
                draw_seeds(axis, found.lengths, values, arm)
        left.set(xscale="log", ylim=(-3, 103), xlabel="tokens of context", ylabel="values found (%)")
        right.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="perplexity")
        left.legend(fontsize=7, loc="lower left")


def write_beside(results: Path) -> str:
    """Write the tables and the chart beside `results`, under its name; return the tables."""
    found = json.loads(results.read_text(encoding="utf-8"))
    text = tables(found)
    with whole_file(results.with_suffix(".md")) as stream:
        stream.write(text + "\n")
    plot(found, results.with_suffix(".png"))
    return text


def write_report(results: Path, output: Path) -> None:
    """Write the tables into the section `results_TARGET` of `output`, the chart beside `results`."""
    found = json.loads(results.read_text(encoding="utf-8"))
    replace_section(output, f"results_{found['settings']['target_length']}", tables(found))
    plot(found, results.with_suffix(".png"))


if __name__ == "__main__":
    report_command(__doc__, "experiment.py", write_report)
