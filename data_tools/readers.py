"""Raw documents from JSONL files and folders of text, in a fixed order, with where each came from."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ksa.errors import UsageError

JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class RawDocument:
    """One document as read: undecoded, so that decoding and its errors belong to the workers.

    Args:
        origin: `file:line` of a JSONL record, or the path of a text file.
        payload: bytes of the line or of the whole file.
        is_json: the payload is a JSON object with a text field, rather than text.
        bytes_read: bytes of input that reading this document consumed, for progress.
    """

    origin: str
    payload: bytes
    is_json: bool
    bytes_read: int


def input_files(inputs: list[str], pattern: str) -> list[Path]:
    """The files to read: JSONL files as named, folders as the sorted files in them that match `pattern`.

    Raises:
        UsageError: a path that does not exist, a file that is not JSONL, a folder without a match.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.glob(pattern) if file.is_file())
            if not found:
                raise UsageError(f"--input {name}: no file in this folder matches --glob {pattern!r}")
            files += found
        elif path.is_file() and path.name.endswith(JSONL_SUFFIXES):
            files.append(path)
        elif path.is_file():
            raise UsageError(f"--input {name}: a file must be one of {', '.join(JSONL_SUFFIXES)}; pass a folder for text")
        else:
            raise UsageError(f"--input {name}: no such file or folder")
    return files


def _json_lines(path: Path) -> Iterator[RawDocument]:
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        position = 0
        for number, line in enumerate(lines, start=1):
            consumed, position = raw.tell() - position, raw.tell()
            if line.strip():
                yield RawDocument(f"{path}:{number}", line, is_json=True, bytes_read=consumed)


def read_documents(files: list[Path]) -> Iterator[RawDocument]:
    """Every document of the files, in order; blank lines of JSONL are not documents."""
    for path in files:
        if path.name.endswith(JSONL_SUFFIXES):
            yield from _json_lines(path)
        else:
            payload = path.read_bytes()
            yield RawDocument(str(path), payload, is_json=False, bytes_read=len(payload))
