"""The deviations that `nccl_check.py` wrote, as a table of a Markdown file.

    python tests/training/nccl_report.py nccl_4.json docs/results.md

They go into the section `nccl_N` for N processes.
"""

import json
from collections import defaultdict
from pathlib import Path

from megatron_ksa.markdown import replace_section, report_command, table


def text(record: dict) -> str:
    """Layouts that agree with one process, and how far; those that do not, and those that were not run."""
    rows, skipped = [], defaultdict(list)
    for name, result in record["layouts"].items():
        if "skipped" in result:
            skipped[result["skipped"]].append(name)
            continue
        found = result.get("failed") or f"{result['largest_relative_deviation']:.1e}"
        numbers = [
            f"{result[key]:{form}}" if key in result else ""
            for key, form in (("allowed", ".0e"), ("first_step_deviation", ".1e"), ("allowed_first", ".0e"))
        ]
        rows.append([name, found, *numbers, _yes(result["agrees"])])
    columns = ["layout", "largest relative deviation", "allowed", "at the first step", "allowed", "agrees"]
    versions = f"torch {record['machine']['torch']}, commit {record['machine']['commit']}"
    where = f"{record['processes']} {record['device']}, {versions}, {record['steps']} steps:"
    parts = [where, table(columns, rows)]
    return "\n\n".join([*parts, *(f"Not run ({why}): {'; '.join(names)}." for why, names in skipped.items())])


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "no"


def write_report(results: Path, path: Path) -> None:
    """Put the table of a file of results into its section of a Markdown file."""
    record = json.loads(results.read_text(encoding="utf-8"))
    replace_section(path, f"nccl_{record['processes']}", text(record))


if __name__ == "__main__":
    report_command(__doc__, "nccl_check.py", write_report)
