"""Tables of measured numbers in Markdown files, written by the scripts that measured them."""

from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- /name -->` of a file, in place of what is there.

    Raises:
        UsageError: the file has no such lines.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8")
    before, found, rest = content.partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise UsageError(f"{path}: no section between {first} and {last} to write the table into")
    with whole_file(path) as stream:
        stream.write(f"{before}{first}\n{text.strip()}\n{last}{after}")
