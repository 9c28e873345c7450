"""Sums of what a checkpoint holds, formed from memory while it is written.

Megatron 0.19.2 can hash a checkpoint: SHA-256 of every file of every rank, read again by the first rank. Here each
rank's writer stores a record with XXH3-128 sums of the tensors and objects that it writes; a thread forms them beside
the disk's work. `checkpoint_comparison` compares while reading: no file is read for its sum alone.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small, whole_file
from megatron_ksa.upstream.patches import Patch

PREFIX, COMMON = ".files_", ".files_common.json"
CONFIG, METADATA = "metadata.json", ".metadata"
BLOCK = 1 << 18
# A record has about a hundred bytes for each tensor that a rank writes.
RECORD_BYTES = 1 << 28


@dataclass(frozen=True)
class StoredItem:
    """A tensor or an object in a file: its place, bytes, and XXH3-128 in hexadecimal."""

    offset: int
    length: int
    is_tensor: bool
    xxh3: str


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written: bytes, and the sum of its content or of each item in it (none where sums were off)."""

    bytes: int
    xxh3: str | None = None
    items: tuple[StoredItem, ...] = ()


def write_record(path: Path, files: dict[str, StoredFile]) -> None:
    """Store what files of a checkpoint are like, in a record beside them; the record has a sum of itself."""
    rows = {
        name: {"bytes": file.bytes, "xxh3": file.xxh3, "items": [astuple(item) for item in file.items]}
        for name, file in files.items()
    }
    with whole_file(path) as stream:
        json.dump({"files": rows, "xxh3": _sum_of_rows(rows)}, stream)


def _sum_of_rows(rows: dict) -> str:
    return xxhash.xxh3_128(json.dumps(rows).encode()).hexdigest()


def read_records(folder: Path) -> dict[str, StoredFile]:
    """What the records of a checkpoint say of its files.

    Raises:
        UsageError: a record that cannot be read.
    """
    files: dict[str, StoredFile] = {}
    for record in sorted(folder.glob(f"{PREFIX}*.json")):
        try:
            read = json.loads(read_small(record, limit=RECORD_BYTES))
            rows = read.get("files", read)  # those of earlier versions have no sum of themselves
            if rows is not read and _sum_of_rows(rows) != read["xxh3"]:
                raise ValueError("its checksum differs")
            for name, row in rows.items():
                items = tuple(StoredItem(*item) for item in row.get("items", ()))
                files[str(name)] = StoredFile(int(row["bytes"]), row["xxh3"], items)
        except (UsageError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{record} is damaged ({type(error).__name__}: {error})") from None
    return files


def sum_of(path: Path) -> str:
    """XXH3-128 of a file's content."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sum_of_tensor(tensor: Tensor) -> str:
    """XXH3-128 of a tensor on the CPU: its dtype, shape and elements."""
    tensor = tensor.detach().contiguous()
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sums_of_buckets(write_buckets: list) -> list[list[tuple[bool, str]]]:
    """For each file, of its objects and then its tensors, as Megatron writes them: whether it is a tensor, and its sum.

    Args:
        write_buckets: (path, name, (objects, tensors)), each with what it is written for.
    """
    return [
        [
            *((False, xxhash.xxh3_128(data.getbuffer()).hexdigest()) for _, data in objects),
            *((True, sum_of_tensor(tensor)) for _, tensor in tensors),
        ]
        for _, _, (objects, tensors) in write_buckets
    ]


def _recording(original: Callable, contents: bool) -> Callable:
    @wraps(original)
    def write_preloaded_data_multithread(
        transform_list: list, use_msc: bool, rank: int, write_buckets: list, global_results_queue: Any
    ) -> None:
        if use_msc:  # no files
            return original(transform_list, use_msc, rank, write_buckets, global_results_queue)
        _failed.clear()
        with ThreadPoolExecutor(1) as pool:
            sums = pool.submit(_sums_of_buckets, write_buckets) if contents else None
            recorded = _Recorded(global_results_queue, rank, write_buckets, sums)
            try:
                return original(transform_list, use_msc, rank, write_buckets, recorded)
            except AssertionError:
                if not _failed:
                    raise
                # Megatron's, about the kind of a thread's result: it was the error of a write.
                return global_results_queue.put(_failed[0])

    return write_preloaded_data_multithread


# Errors of the writes of the save that this process is doing: Megatron tells their class alone.
_failed: list[Exception] = []


def _of_the_disk(error: Exception) -> Exception:
    """The error of the operating system that the error came of: torch's writer says that its position is unexpected."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError):
            return each
        each = each.__cause__ or each.__context__
    return error


def _noting_failures(original: Callable) -> Callable:
    @wraps(original)
    def write_preloaded_data(*args: Any, **options: Any) -> tuple[int, Any]:
        done = original(*args, **options)
        if isinstance(done[1], Exception):
            _failed.append(_of_the_disk(done[1]))
        return done

    return write_preloaded_data


@dataclass
class _Recorded:
    """The queue that a writer reports to: its report goes on when the record of the files is stored."""

    queue: Any
    rank: int
    write_buckets: list
    sums: "Future[list[list[tuple[bool, str]]]] | None"

    def put(self, results: dict | Exception) -> None:
        """Store the record, then report."""
        if isinstance(results, Exception):
            results = _failed[0] if _failed else results
        else:
            try:
                self._store(results)
            except OSError as error:
                results = error
            except UsageError as error:
                # Other processes learn of the error of the disk, which has a number.
                results = error.__context__ if isinstance(error.__context__, OSError) else error
        self.queue.put(results)

    def _store(self, results: dict[int, list]) -> None:
        sums = [[] for _ in self.write_buckets] if self.sums is None else self.sums.result()
        files = {}
        for place, (bucket, found) in enumerate(zip(self.write_buckets, sums, strict=True)):
            places = [(done.storage_data.offset, done.storage_data.length) for done in results[place]]
            items = [StoredItem(*at, *each) for at, each in zip(places, found, strict=bool(found))]
            files[Path(bucket[0]).name] = StoredFile(Path(bucket[0]).stat().st_size, None, tuple(items))
        write_record(Path(self.write_buckets[0][0]).parent / f"{PREFIX}{self.rank}.json", files)


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
    Patch(
        f"{WRITER}:FileSystemWriterAsync.write_preloaded_data_multithread",
        _recording,
        why="sizes and sums of a checkpoint's files are stored beside them",
        expects="(transform_list, use_msc, rank, write_buckets, global_results_queue)",
    ),
    Patch(
        f"{WRITER}:FileSystemWriterAsync.write_preloaded_data",
        _noting_failures,
        why="a save that fails on a full disk does not say so",
        expects="(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs)",
    ),
    Patch(
        "megatron.core.dist_checkpointing.serialization:save_config",
        _with_common,
        why="sizes and sums of a checkpoint's metadata are stored beside it",
        expects="(config, checkpoint_dir)",
    ),
)


def patches(contents: bool) -> tuple[Patch, ...]:
    """Records of every checkpoint that is saved; with sums of contents or sizes alone."""
    recording, noting, common = PATCHES
    return recording.given(contents), noting, common.given(contents)
