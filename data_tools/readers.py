"""Raw documents from JSONL, JSON arrays, Parquet and folders of text, in a fixed order, with where each came from.

A byte order mark at the start of a file or line is dropped; a text file keeps its line ends. A document that cannot be
read comes with the reason in place of its bytes (`RawDocument.payload` raises it): the caller counts it and goes on.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_ksa.data_tools.documents import TOO_LARGE, RawDocument
from megatron_ksa.data_tools.parquet import read_rows, read_text_column
from megatron_ksa.errors import UsageError

# What a file gives when it is read: its bytes, or those that it holds compressed.
Stream = io.BufferedReader | gzip.GzipFile
Reader = Callable[[Path, Stream, IO[bytes], int], Iterator[RawDocument]]
JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
ARRAY_SUFFIXES = (".json", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
# What a reader holds of one document where its caller sets no limit of its own.
MAX_DOCUMENT_BYTES = 100_000_000
_SPACE = re.compile(r"[ \t\r\n]*")


def is_one_of(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of the suffixes, in upper or lower case."""
    return path.name.lower().endswith(suffixes)


def input_files(inputs: list[str], pattern: str, others: tuple[str, ...] = ()) -> list[Path]:
    """The files to read: JSONL and Parquet files as named, folders as the sorted files in them that match `pattern`.

    Args:
        others: suffixes of further files that the caller reads.

    Raises:
        UsageError: a path that does not exist, a file that is neither, a folder without a match.
    """
    files: list[Path] = []
    known = (*JSONL_SUFFIXES, PARQUET_SUFFIX, *others)
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += _files_of_folder(path, name, pattern)
        elif path.is_file() and is_one_of(path, known):
            files.append(path)
        elif path.is_file():
            raise UsageError(f"--input {name}: a file must be one of {', '.join(known)}; pass a folder for text")
        elif path.exists():
            raise UsageError(f"--input {name}: neither a regular file nor a folder")
        else:
            raise UsageError(f"--input {name}: no such file or folder")
    return files


def passed_over(inputs: list[str], files: list[Path], pattern: str) -> str:
    """What to say of the files in the folders that are not among `files`; "" where there are none."""
    folders = [name for name in inputs if Path(name).is_dir()]
    there = {Path(folder, name) for each in folders for folder, _, names in os.walk(each) for name in names}
    others = sorted(there - set(files))
    return (
        f"not read: {len(others):,} files that --glob {pattern!r} does not match, such as {others[0]}" if others else ""
    )


def _files_of_folder(folder: Path, name: str, pattern: str) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise UsageError(f"--input {name}: {error.filename} cannot be read: {error.strerror}")

    for _ in os.walk(folder, onerror=unreadable):
        pass  # pathlib passes over folders that cannot be read
    try:
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--glob {pattern!r}: {error}") from None
    if not found:
        raise UsageError(f"--input {name}: no file in this folder matches --glob {pattern!r}")
    return found


def _decompressed(path: Path, raw: io.BufferedReader) -> Stream:
    if is_one_of(path, (".gz",)):
        return gzip.open(raw)
    if is_one_of(path, (".zst",)):
        try:
            import zstandard
        except ModuleNotFoundError:
            raise UsageError(f"{path}: reading .zst needs a package: pip install zstandard") from None
        return io.BufferedReader(_ZstdReader(raw, zstandard.ZstdDecompressor().decompressobj), 1 << 17)
    return raw


class _ZstdReader(io.RawIOBase):
    """The content of Zstandard frames; unlike the library's reader it does not take a truncated file for a whole one.

    Args:
        raw: the file.
        new: makes a decompressor of one frame.
    """

    # A kilobyte can hold 256 compressed blocks of 128 KiB each, so that one read takes at most 32 MiB of memory.
    STEP = 1024

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new, self._content = raw, new, memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        rest = b""
        while not self._content:
            if self._frame is not None and self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
            packed = rest or self._raw.read(self.STEP)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new()
            rest, self._content = b"", memoryview(self._frame.decompress(packed))
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _compression_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError, gzip.BadGzipFile, zlib.error
    return EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError


def _too_large(size: int, limit: int) -> tuple[str, str]:
    return TOO_LARGE, f"{size:,} bytes, more than {limit:,}"


def _json_lines(path: Path, stream: Stream, raw: IO[bytes], limit: int) -> Iterator[RawDocument]:
    number = position = 0
    while line := stream.readline(limit + len(codecs.BOM_UTF8) + 2):
        number, size = number + 1, len(line)
        if size > limit and not line.endswith(b"\n"):
            last = line
            while last and not last.endswith(b"\n"):
                last = stream.readline(1 << 20)
                size += len(last)
        consumed, position = raw.tell() - position, raw.tell()
        line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of a file that was joined to another
        if size - 2 > limit:
            yield RawDocument(f"{path}:{number}", b"", True, consumed, problem=_too_large(size, limit))
        elif line.strip():
            yield RawDocument(f"{path}:{number}", line, is_json=True, bytes_read=consumed)


class _ArrayText:
    """The text of a JSON array, as much of it as the element at hand needs."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.ended = "", 0, False

    def more(self) -> None:
        """Twice the text, from the position on."""
        rest = self.text[self.position :]
        chunk = self._stream.read(max(1 << 16, len(rest)))
        self.ended = not chunk
        self.text, self.position = rest + self._decoder.decode(chunk, final=self.ended), 0

    def next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()

    def element(self, scanner: json.JSONDecoder, limit: int) -> str:
        """The text of the value that starts here.

        Raises:
            ValueError, RecursionError: it is not JSON, or longer than limit characters.
        """
        while True:
            try:
                end = scanner.raw_decode(self.text, self.position)[1]
            except ValueError:
                if self.ended or len(self.text) - self.position > limit:
                    raise
            else:
                if end < len(self.text) or self.ended:  # a number may go on
                    element = self.text[self.position : end]
                    self.position = end
                    return element
            self.more()


def _array_elements(path: Path, stream: Stream, raw: IO[bytes], limit: int) -> Iterator[RawDocument]:
    array, scanner, number, position = _ArrayText(stream), json.JSONDecoder(), 0, 0
    try:
        array.next()
        array.position += 1
        more = array.next() != "]"
        while more:
            number += 1
            content = array.element(scanner, limit).encode("utf-8", "surrogatepass")
            consumed, position = raw.tell() - position, raw.tell()
            problem = _too_large(len(content), limit) if len(content) > limit else None
            yield RawDocument(f"{path}:{number}", b"" if problem else content, True, consumed, problem=problem)
            separator = array.next()
            more = separator != "]"
            if more:
                if separator != ",":
                    raise ValueError(f"{separator!r} where a comma or ] belongs")
                array.position += 1
                array.next()
        array.position += 1
        if rest := array.next():
            raise ValueError(f"{rest!r} after the array")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: the JSON array cannot be read from element {max(number, 1)} on ({error}); elements hold "
            f"at most {limit:,} bytes"
        ) from None


def _text(path: Path, stream: Stream, raw: IO[bytes], limit: int) -> Iterator[RawDocument]:
    content = stream.read(limit + len(codecs.BOM_UTF8) + 1).removeprefix(codecs.BOM_UTF8)
    problem = None
    if len(content) > limit:
        problem = TOO_LARGE, f"more than {limit:,} bytes"
    size = path.stat().st_size
    yield RawDocument(str(path), b"" if problem else content, is_json=False, bytes_read=size, problem=problem)


def _stream(path: Path, limit: int, read: Reader | None = None) -> Iterator[RawDocument]:
    """Documents of a JSONL file, a JSON array or a text file, which may be compressed.

    Args:
        read: what reads it; by the file's name where it is None.
    """
    with open(path, "rb") as raw:
        try:
            if is_one_of(path, (".gz", ".zst")) and not raw.peek(1):
                raise EOFError("no byte in it")  # which gzip takes for a whole file
            stream = _decompressed(path, raw)
            if read is None and not is_one_of(path, JSONL_SUFFIXES):
                read = _text
            if read is None:
                start = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()
                read = _array_elements if start[:1] == b"[" and is_one_of(path, ARRAY_SUFFIXES) else _json_lines
            yield from read(path, stream, raw, limit)
        except _compression_errors() as error:
            raise UsageError(f"{path}: truncated or damaged ({error}); fetch it again") from None


@contextmanager
def _told(flag: str, path: Path) -> Iterator[None]:
    """Errors in a file say which flag named it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from None
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror or error}") from None


def read_json_lines(path: Path, *, max_bytes: int = MAX_DOCUMENT_BYTES, flag: str = "--input") -> Iterator[RawDocument]:
    """The lines of a file of JSON lines, whatever its name; one that ends in .gz or .zst is compressed.

    Args:
        max_bytes: as `read_documents` takes it.
        flag: what named the file, for errors.

    Raises:
        UsageError: a file that is damaged or cannot be read.
    """
    with _told(flag, path):
        yield from _stream(path, max_bytes, _json_lines)


def read_documents(
    files: list[Path], *, max_bytes: int = MAX_DOCUMENT_BYTES, text_column: str | None = None, flag: str = "--input"
) -> Iterator[RawDocument]:
    """Every document of the files, in order; blank lines of JSONL are not documents.

    Args:
        max_bytes: no larger document is held in memory; it comes with the problem `TOO_LARGE`.
        text_column: column of Parquet files to read as text; all columns, as JSON, without it.
        flag: what named the files, for errors.

    Raises:
        UsageError: a file that is damaged or cannot be read, a format whose package is not installed.
    """
    for path in files:
        with _told(flag, path):
            if is_one_of(path, (PARQUET_SUFFIX,)):
                yield from (
                    read_rows(path, max_bytes)
                    if text_column is None
                    else read_text_column(path, text_column, max_bytes)
                )
            else:
                yield from _stream(path, max_bytes)
