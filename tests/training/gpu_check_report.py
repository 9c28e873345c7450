"""The deviations that `gpu_check.py` wrote, as a table of a Markdown file.

    python tests/training/gpu_check_report.py tests/training/results/gpu_check_h200.json docs/results.md

They go into the section `gpu_check` of a file of one GPU, `gpu_check_ranks` of several.
"""

import json
from collections import defaultdict
from pathlib import Path

from megatron_ksa.markdown import replace_section, report_command, table

COLUMNS = ["kind", "compared with", "loss", "gradient norm", "of the first step", "losses allowed", "agrees"]


def text(record: dict) -> str:
    """Largest relative deviations of each kind; those that failed, and those that were not run."""
    rows, skipped = [], defaultdict(list)
    for name, result in record["results"].items():
        if "skipped" in result:
            skipped[result["skipped"]].append(name)
        elif "failed" in result:
            rows.append([name, "", result["failed"], "", "", "", "no"])
        elif "like" in result:
            found = (result["deviations"].get(value) for value in ("loss", "grad_norm", "first_grad_norm"))
            deviations = ["" if value is None else f"{value:.1e}" for value in found]
            agrees = "yes" if result["agrees"] else "no"
            rows.append([name, result["like"], *deviations, f"{result['limit']:.0e}", agrees])
    machine = record["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}, {record['steps']} steps:"
    return "\n\n".join(
        [where, table(COLUMNS, rows), *(f"Not run ({why}): {', '.join(names)}." for why, names in skipped.items())]
    )


def write_report(results: Path, path: Path) -> None:
    """Put the table of a file of results into its section of a Markdown file."""
    section = "gpu_check_ranks" if results.stem.startswith("gpu_check_ranks") else "gpu_check"
    replace_section(path, section, text(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    report_command(__doc__, "gpu_check.py", write_report)
