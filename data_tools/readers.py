"""Raw documents from JSONL, Parquet and folders of text, in a fixed order, with where each came from."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_ksa.errors import UsageError

JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True)
class RawDocument:
    """One document as read: undecoded, so that decoding and its errors belong to the workers.

    Args:
        origin: `file:line` of a JSONL record, `file:row` of a Parquet row, or the path of a text file.
        payload: bytes of the line or of the whole file.
        is_json: the payload is a JSON object with a text field, rather than text.
        bytes_read: bytes of input that reading this document consumed, for progress.
    """

    origin: str
    payload: bytes
    is_json: bool
    bytes_read: int


class BadDocument(Exception):
    """A document that cannot be read: a reason that can be counted, and what is the matter with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def decoded(payload: bytes) -> str:
    """The payload as text.

    Raises:
        BadDocument: invalid UTF-8.
    """
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument("invalid UTF-8", f"{error.reason} at byte {error.start}") from None


def json_object(payload: bytes) -> dict:
    """The JSON object in a document's payload.

    Raises:
        BadDocument: invalid UTF-8 or JSON, or not an object.
    """
    text = decoded(payload)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadDocument("not an object", f"a JSON {type(record).__name__} where an object is needed")
    return record


def input_files(inputs: list[str], pattern: str, flag: str = "--input") -> list[Path]:
    """The files to read: JSONL and Parquet files as named, folders as the sorted files in them that match `pattern`.

    Raises:
        UsageError: a path that does not exist, a file that is neither, a folder without a match.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.glob(pattern) if file.is_file())
            if not found:
                raise UsageError(f"{flag} {name}: no file in this folder matches --glob {pattern!r}")
            files += found
        elif path.is_file() and path.name.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX)):
            files.append(path)
        elif path.is_file():
            known = ", ".join((*JSONL_SUFFIXES, PARQUET_SUFFIX))
            raise UsageError(f"{flag} {name}: a file must be one of {known}; pass a folder for text")
        else:
            raise UsageError(f"{flag} {name}: no such file or folder")
    return files


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ModuleNotFoundError:
            raise UsageError(f"--input {path}: reading .zst needs a package: pip install zstandard") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _compression_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError, gzip.BadGzipFile, zlib.error
    return EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError


def _json_lines(path: Path) -> Iterator[RawDocument]:
    with open(path, "rb") as raw:
        position = 0
        try:
            for number, line in enumerate(_decompressed(path, raw), start=1):
                consumed, position = raw.tell() - position, raw.tell()
                if line.strip():
                    yield RawDocument(f"{path}:{number}", line, is_json=True, bytes_read=consumed)
        except _compression_errors() as error:
            raise UsageError(f"--input {path}: truncated or damaged ({error}); fetch it again") from None


def _parquet_rows(path: Path) -> Iterator[RawDocument]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UsageError(f"--input {path}: reading Parquet needs a package: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as table:
            number, share = 0, path.stat().st_size / max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    consumed, number = int((number + 1) * share) - int(number * share), number + 1
                    payload = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                    yield RawDocument(f"{path}:{number}", payload, is_json=True, bytes_read=consumed)
    except (ArrowException, OSError) as error:
        raise UsageError(f"--input {path}: not a Parquet file that can be read ({error})") from None


def read_documents(files: list[Path]) -> Iterator[RawDocument]:
    """Every document of the files, in order; blank lines of JSONL are not documents.

    Raises:
        UsageError: a compressed file that is damaged, a format whose package is not installed.
    """
    for path in files:
        if path.name.endswith(JSONL_SUFFIXES):
            yield from _json_lines(path)
        elif path.name.endswith(PARQUET_SUFFIX):
            yield from _parquet_rows(path)
        else:
            payload = path.read_bytes()
            yield RawDocument(str(path), payload, is_json=False, bytes_read=len(payload))
