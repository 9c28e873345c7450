"""Tables of measured numbers in Markdown files, written by the scripts that measured them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file


def cell(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean over seeds ± half their range; a dash where there is nothing."""
    if not values:
        return "-"
    spread = (max(values) - min(values)) / 2 * scale
    return f"{np.mean(values) * scale:.{digits}f} ± {spread:.{digits}f}"


def table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- /name -->` of a file, in place of what is there.

    Raises:
        UsageError: the file has no such lines.
    """
    before, after = _around(path, name)
    with whole_file(path) as stream:
        stream.write(f"{before}{text.strip()}{after}")


def check_section(path: Path, name: str) -> None:
    """Look for the place of a table before it is measured.

    Raises:
        UsageError: no such file, or no such lines in it as `replace_section` needs.
    """
    if not path.is_file():
        raise UsageError(f"--report {path} does not exist")
    _around(path, name)


def _around(path: Path, name: str) -> tuple[str, str]:
    """What stands before and behind the text of a section, with its two lines."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise UsageError(f"{path}: no section between {first} and {last} to write the table into")
    return f"{before}{first}\n", f"\n{last}{after}"


def report_command(description: str, measured_by: str, write: Callable[[Path, Path], object]) -> None:
    """The command line `report.py RESULTS OUTPUT`: tables of a file of results into the section of a Markdown file.

    Args:
        description: for `--help`; its first line is shown.
        measured_by: the script that writes RESULTS.
        write: called with both paths.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("results", type=Path, help=f"JSON that {measured_by} wrote")
    parser.add_argument("output", type=Path, help="Markdown file with the section")
    args = parser.parse_args()
    with usage_errors_exit():
        for path, way_out in ((args.results, f"; {measured_by} writes it"), (args.output, "")):
            if not path.is_file():
                raise UsageError(f"{path} does not exist{way_out}")
        write(args.results, args.output)
