"""Files between the steps: each appears when it is whole, with the same bytes for the same content."""

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

# A document of the largest size that is read (`readers.MAX_DOCUMENT_BYTES`), each character escaped, and its tags.
MAX_LINE_BYTES = 700_000_000


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file, or the files of a folder, each of which appears only when it is whole; the folder's others go."""
    if not source.is_dir():
        with open(source, "rb") as read, whole_file(path, "wb") as stream:
            shutil.copyfileobj(read, stream)
        return
    for old in path.glob("*"):
        if not (source / old.name).exists():
            old.unlink()
    for file in source.iterdir():
        copy_whole(file, path / file.name)


def json_line(row: dict) -> str:
    """A row as one line of JSONL, its end included."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Write rows; returns how many."""
    count = 0
    with whole_file(path) as stream:
        for row in rows:
            stream.write(json_line(row))
            count += 1
    return count


def lines_of(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file that `write_jsonl` wrote, their ends included.

    Lines end with "\\n" only: JSON leaves U+2028 and its like unescaped, which str.splitlines would split at.

    Raises:
        UsageError: a line of more than `MAX_LINE_BYTES`.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(
                f"{path}:{number}: more than {MAX_LINE_BYTES:,} bytes in a line; no step writes such a row"
            )
        yield line


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a file that `write_jsonl` wrote.

    Raises:
        UsageError: the file is missing or was changed into something else.
    """
    for number, line in enumerate(read_lines(path), start=1):
        yield row_of(line, f"{path}:{number}")


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of such a file, their ends included.

    Raises:
        UsageError: the file is missing, or a line is too long.
    """
    try:
        with open(path, "rb") as stream:
            yield from lines_of(stream, path)
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: run the step that writes it first (data_tools/tags/README.md)"
        ) from None
    except OSError as error:
        raise UsageError(f"{str(path)[:200]} cannot be read: {error.strerror}") from None


def row_of(line: bytes, place: str) -> dict:
    """The row that a line holds.

    Raises:
        UsageError: something else, with the place of the line.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: {error}; delete the file and run its step again") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place}: no JSON object; delete the file and run its step again")
    return row


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document with sorted keys."""
    with whole_file(path) as stream:
        stream.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an `.npz` file; numpy stamps its members with a fixed date, so the same arrays are the same bytes."""
    with whole_file(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_arrays` wrote.

    Raises:
        UsageError: the file is missing or is no `.npz`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: run the step that writes it first (data_tools/tags/README.md)"
        ) from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: {error}; delete it and run its step again") from None
