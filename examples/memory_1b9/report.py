"""Table of a file of peaks: what was measured, what the memory model says, and how far apart they are.

python examples/memory_1b9/report.py examples/memory_1b9/results_h100.json docs/results.md
"""

import json
from pathlib import Path

from megatron_ksa.markdown import replace_section, report_command, table

SECTION = "memory_1b9"
NAMES = {"ksa": "KSA", "full": "full attention"}


def tables(runs: list[dict]) -> str:
    """Markdown of all runs, a row a case, and a line that says where."""
    rows, worst = [], 0.0
    for run in runs:
        for case in run["cases"]:
            measured, predicted = case["peak"], case["predicted"]["total"]
            error = predicted / measured - 1
            worst = max(worst, abs(error))
            rows.append([
                NAMES[run["model"]], run["ranks"], f"{case['length']:,}",
                case["what"] + " (what fits)" * case["fit"],
                _gib(measured), _gib(predicted), f"{error * 100:+.1f} %", _gib(case["bytes"]["reserved"]),
                f"{case['seconds'] * 1e3:,.0f}",
            ])  # fmt: skip
    machine = runs[0]["machine"]
    where = f"One to several {machine.get('gpu')}" if machine.get("gpu") else str(machine.get("device"))
    where += f", torch {machine['torch']}, commit {machine['commit'][:9]}, micro-batch 1; largest deviation "
    return "\n\n".join([
        f"{where}{worst * 100:.1f} %.",
        table(
            ["attention", "GPUs", "text tokens", "recomputed", "peak GiB", "predicted", "deviation", "reserved",
             "ms"], rows,
        ),
    ])  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**24 else f"{size / 2**30:.5f}"


def write_report(results: Path, path: Path) -> None:
    """Put the table of a file of results into its section of a Markdown file."""
    runs = json.loads(results.read_text(encoding="utf-8"))
    replace_section(path, SECTION, tables(runs))


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)
