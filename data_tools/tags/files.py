"""Files between the steps: each appears when it is whole, with the same bytes for the same content."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file


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


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a file that `write_jsonl` wrote.

    Raises:
        UsageError: the file is missing or was changed into something else.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            # Lines end with "\n" only: JSON leaves U+2028 and its like unescaped, which str.splitlines would split at.
            for number, line in enumerate(stream, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{path}:{number}: {error}; delete the file and run its step again") from None
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: run the step that writes it first (data_tools/tags/README.md)"
        ) from None


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
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}; delete it and run its step again") from None
