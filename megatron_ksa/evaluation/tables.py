"""Tables of an experiment in Markdown, written between the marks of a document."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ksa.files import whole_file

START, END = "<!-- results -->", "<!-- end of results -->"


def cell(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean over seeds ± half their range; a dash where there is nothing."""
    if not values:
        return "-"
    spread = (max(values) - min(values)) / 2 * scale
    return f"{np.mean(values) * scale:.{digits}f} ± {spread:.{digits}f}"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table: a heading, a rule, a line a row."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def write_between_marks(text: str, output: Path) -> None:
    """Write `text` between the marks of `output`, or as the whole of a file without them."""
    document = output.read_text(encoding="utf-8") if output.exists() else ""
    if START in document and END in document:
        before, after = document.split(START)[0], document.split(END)[1]
        text = f"{before}{START}\n\n{text}\n\n{END}{after}"
    with whole_file(output) as stream:
        stream.write(text if text.endswith("\n") else text + "\n")
