"""Files and folders that are there whole or not at all, errors of the disk in one line, small files read in bounds."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_ksa.errors import UsageError

# A list of bases, a file of flags: larger ones are a mistake (a dataset, /dev/zero).
SMALL_FILE_BYTES = 1_000_000
# The index of the largest models has some megabytes.
MAX_JSON_BYTES = 100_000_000

# A list of datasets, an index of shards, a work folder's manifest: as many megabytes as there are files, and no more.
LIST_BYTES = 1 << 28

# Errors that a write alone can have, whatever the library that writes.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# How libraries in Rust (tokenizers, safetensors) report the number of an error of the operating system, and Python
# where only the words reach this process.
_CODE = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)|\[Errno (\d+)\]")


def disk_error(error: BaseException, folder: Path) -> str | None:
    """Words of the operating system, such as "No space left on device", where a write is what failed.

    Args:
        error: looked at with its causes and the members of exception groups.
        folder: where the output goes: whatever the system says of a file in it concerns the output.

    Returns:
        None where the error is about something else.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, OSError) and each.errno is not None:
            names = [
                Path(os.fsdecode(name)) for name in (each.filename, each.filename2) if isinstance(name, str | bytes)
            ]
            inside = any(folder == name or folder in name.parents for name in names)
            if each.errno in _DISK_ERRORS or inside:
                return os.strerror(each.errno)
        found = _CODE.search(str(each))
        if found and (number := int(found[1] or found[2] or found[3])) in _DISK_ERRORS:
            return os.strerror(number)
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
        # torch's CheckpointException: error and traceback of each rank.
        failures = getattr(each, "failures", None)
        if isinstance(failures, dict):
            pending += [failure[0] for failure in failures.values()]
        pending += [each.__cause__, each.__context__]
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk that the body meets while it writes `path` into one line.

    Raises:
        UsageError: a full, read-only or broken disk, or a folder that cannot be written to.
    """
    try:
        yield
    except (UsageError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # Megatron's CheckpointException is a BaseException.
    except BaseException as error:
        reason = disk_error(error, path.parent)
        if reason is None:
            raise
        raise UsageError(f"{path} cannot be written: {reason}; make room or choose another output") from None


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """A stream to a temporary file that takes the name `path` when the body ends, and is removed if it fails.

    Args:
        path: the file; its folder is made where there is none.
        mode: "w" for UTF-8 text or "wb".

    Raises:
        UsageError: the disk is full, the folder cannot be written to, or there is a folder or a device of this name.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise UsageError(f"{str(path)!r} is no file that can be written or replaced: name another output")
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(
                partial, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n"
            ) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, and notice at the start of long work that nothing can be written to it.

    Raises:
        UsageError: the folder cannot be made, or a file in it.
    """
    with writing(folder / "any file"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the name `path` when the body ends, and is removed with all in it if the body fails.

    What an earlier run left when it was killed is removed first: hold `locks.exclusive(path, ...)` around it.

    Args:
        path: a name that is free; the folder it is in is made where there is none.

    Raises:
        UsageError: the disk is full, or the folder around it cannot be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as stream:
                        os.fsync(stream.fileno())
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_small(path: Path, flag: str = "", limit: int = SMALL_FILE_BYTES) -> str:
    """The text of a file that people or configurations write, without a byte order mark.

    Args:
        flag: what named the file, for errors.
        limit: bytes; no more than that is read, so /dev/zero does not fill the memory.

    Raises:
        UsageError: it cannot be read, is larger, or is not UTF-8.
    """
    name = f"{flag} {str(path)[:200]}".strip()
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name
        raise UsageError(f"{name!r} cannot be read: {error}") from None
    if len(content) > limit:
        raise UsageError(f"{name} has more than {limit:,} bytes: this is not the file that belongs there")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path, flag: str = "", limit: int = MAX_JSON_BYTES) -> dict:
    """A JSON object from a file.

    Args:
        flag: what named the file, for errors.
        limit: bytes, as for `read_small`.

    Raises:
        UsageError: a file that is missing, larger or broken.
    """
    name = f"{flag} {path}".strip()
    try:
        content = json.loads(read_small(path, flag, limit))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} holds no JSON object")
    return content
