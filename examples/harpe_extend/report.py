"""Tables of an experiment's results.json, written between the marks of a Markdown file."""

import json
import math
from pathlib import Path

import numpy as np

from megatron_ksa.markdown import cell, replace_section, report_command, table


def tables(results: dict) -> str:
    """Needle and perplexity tables in Markdown; each cell is the mean over seeds ± half their range.

    Arms are compared after as many iterations as all measured seeds of them have: the same tokens for each.
    """
    runs = results["runs"]
    reached: dict[tuple[int, str], set[int]] = {}
    for run in runs:
        if run["steps"]:
            reached.setdefault((run["seed"], run["arm"]), set()).add(run["steps"])
    common = set.intersection(*reached.values()) if reached else set()
    steps = max(common, default=0)
    runs = [run for run in runs if run["steps"] in (0, steps)]
    arms = list(
        dict.fromkeys(
            run["arm"] for run in sorted(runs, key=lambda run: (run["arm"] != "before extension", run["arm"]))
        )
    )
    lengths = sorted({row["length"] for run in runs for row in run["perplexity"]})
    forms = list(dict.fromkeys(row["form"] for run in runs for row in run["needles"]))

    def needles(arm: str, length: int | None, form: str | None) -> str:
        per_seed = [
            np.mean(
                [r["values"] for r in run["needles"] if length in (None, r["length"]) and form in (None, r["form"])]
            )
            for run in runs
            if run["arm"] == arm
        ]
        return cell(per_seed, 100, 1)

    def perplexity(arm: str, length: int) -> str:
        losses = [r["loss"] for run in runs if run["arm"] == arm for r in run["perplexity"] if r["length"] == length]
        return cell([math.exp(loss) for loss in losses], 1, 3)

    head = ["arm", *(f"{length:,}" for length in lengths)]
    seeds = {arm: len({run["seed"] for run in runs if run["arm"] == arm}) for arm in arms}
    label = {arm: f"{arm} ({count} seed{'s' if count > 1 else ''})" for arm, count in seeds.items()}
    by_length = [
        [label[arm], *(needles(arm, length, None) for length in lengths), needles(arm, None, None)] for arm in arms
    ]
    by_form = [[form, *(needles(arm, lengths[-1], form) for arm in arms)] for form in forms]
    by_context = [[label[arm], *(perplexity(arm, length) for length in lengths)] for arm in arms]
    settings = results["settings"]
    return "\n\n".join(
        [
            f"Measured on {results['machine']['device']}: {settings['layers']} layers of {settings['heads']} heads, "
            f"{settings['pretrain_steps']} "
            f"iterations at {settings['pretrain_length']} tokens, then {steps} at {settings['target_length']}, "
            f"{settings['batch_tokens']:,} tokens an iteration; mean ± half the range over seeds.",
            "Needle tests, values found (%), mean of the eight forms, by context length (tokens):",
            table([*head, "mean"], by_length),
            f"By form, at {lengths[-1]:,} tokens:",
            table(["form", *arms], by_form),
            "Perplexity by context length (tokens), the same scored tokens at each:",
            table(head, by_context),
        ]
    )


def write_report(results: Path, output: Path) -> str:
    """Write the tables into the section `results` of `output`; return them."""
    text = tables(json.loads(results.read_text(encoding="utf-8")))
    replace_section(output, "results", text)
    return text


if __name__ == "__main__":
    report_command(__doc__, "experiment.py", write_report)
