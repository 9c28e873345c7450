"""Checksums of a checkpoint's files, formed while they are written: no file is read again for its sum.

Megatron 0.19.2 can hash a checkpoint: SHA-256 of every file of every rank, read again by the first rank. Here each
rank's writer sums what passes through it, in XXH3-128, and stores a record.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import xxhash

from megatron_ksa.files import whole_file
from megatron_ksa.upstream.patches import ABSENT, Patch

PREFIX, COMMON = ".files_", ".files_common.json"
CONFIG, METADATA = "metadata.json", ".metadata"
BLOCK = 1 << 22


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written: bytes, and XXH3-128 in hexadecimal (None where sums were off)."""

    bytes: int
    xxh3: str | None = None


def write_record(path: Path, files: dict[str, StoredFile]) -> None:
    """Store what files of a checkpoint are like, in a record beside them."""
    with whole_file(path) as stream:
        json.dump({name: asdict(file) for name, file in files.items()}, stream)


def sum_of(path: Path) -> str:
    """XXH3-128 of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class _Summed:
    """A file that is written from start to end, and the sum of what was written."""

    def __init__(self, path: str, contents: bool) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._digest = xxhash.xxh3_128() if contents else None

    def __enter__(self) -> "_Summed":
        return self

    def __exit__(self, *error: object) -> None:
        self.stored = StoredFile(self._file.tell(), None if self._digest is None else self._digest.hexdigest())
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        """Write and add to the sum."""
        if self._digest is not None:
            self._digest.update(data)
        return self._file.write(data)


# Files of the save that this process is writing, by path; a save is written by one process and its threads.
_written: dict[str, _Summed] = {}


def _opening(original: object, contents: bool) -> Callable:
    def open_file(path: Any, mode: str = "r", *args: object, **options: object) -> Any:
        if mode != "wb" or args or options:
            return open(path, mode, *args, **options)
        _written[os.fspath(path)] = made = _Summed(os.fspath(path), contents)
        return made

    return open_file


def _recording(original: Callable) -> Callable:
    @wraps(original)
    def write_preloaded_data_multithread(
        transform_list: list, use_msc: bool, rank: int, write_buckets: list, global_results_queue: Any
    ) -> None:
        original(transform_list, use_msc, rank, write_buckets, _Recorded(global_results_queue, rank, write_buckets))

    return write_preloaded_data_multithread


@dataclass
class _Recorded:
    """The queue that a writer reports to: its report goes on when the record of the files is stored."""

    queue: Any
    rank: int
    write_buckets: list

    def put(self, results: dict | Exception) -> None:
        """Store the record, then report."""
        paths = [Path(path) for path, *_ in self.write_buckets]
        files = {path.name: _written.pop(str(path)) for path in paths if str(path) in _written}
        if not isinstance(results, Exception) and files:
            try:
                stored = {name: file.stored for name, file in files.items()}
                write_record(paths[0].parent / f"{PREFIX}{self.rank}.json", stored)
            except OSError as error:
                results = error
        self.queue.put(results)


def store_common(folder: Path, contents: bool) -> None:
    """The record of the two files that describe the whole checkpoint; they are the last that are written."""
    found = {name: folder / name for name in (METADATA, CONFIG)}
    files = {
        name: StoredFile(path.stat().st_size, sum_of(path) if contents else None)
        for name, path in found.items()
        if path.is_file()
    }
    write_record(folder / COMMON, files)


def _with_common(original: Callable, contents: bool) -> Callable:
    @wraps(original)
    def save_config(config: object, checkpoint_dir: str) -> None:
        original(config, checkpoint_dir)
        store_common(Path(checkpoint_dir), contents)

    return save_config


WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
PATCHES = (
    # Takes whether contents are summed.
    Patch(f"{WRITER}:open", _opening, why="files of a checkpoint are summed while they are written", expects=ABSENT),
    Patch(
        f"{WRITER}:FileSystemWriterAsync.write_preloaded_data_multithread",
        _recording,
        why="sizes and sums of a checkpoint's files are stored beside them",
        expects="(transform_list, use_msc, rank, write_buckets, global_results_queue)",
    ),
    # Takes whether contents are summed.
    Patch(
        "megatron.core.dist_checkpointing.serialization:save_config",
        _with_common,
        why="sizes and sums of a checkpoint's metadata are stored beside it",
        expects="(config, checkpoint_dir)",
    ),
)


def patches(contents: bool) -> tuple[Patch, ...]:
    """Records of every checkpoint that is saved; with sums of contents or sizes alone."""
    opening, recording, common = PATCHES
    return opening.given(contents), recording, common.given(contents)
