"""Sums of what a checkpoint holds, formed from memory while it is written and while it is read.

Megatron 0.19.2 can hash a checkpoint: SHA-256 of every file of every rank, read again by the first rank. Here each
rank's writer stores a record with XXH3-128 sums of the tensors and objects that it writes, and whatever reads one of
them compares: no file is read for its sum alone. A thread forms the sums beside the disk's work.
"""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import wraps
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small, whole_file
from megatron_ksa.upstream.patches import Patch

PREFIX, COMMON = ".files_", ".files_common.json"
CONFIG, METADATA = "metadata.json", ".metadata"
BLOCK = 1 << 18
# A record has about a hundred bytes for each tensor that a rank writes.
RECORD_BYTES = 1 << 28
# Smaller tensors are summed at once: a thread is not worth its change of hands.
THREADED_BYTES = 1 << 20


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


def _noting_failures(original: Callable) -> Callable:
    @wraps(original)
    def write_preloaded_data(*args: Any, **options: Any) -> tuple[int, Any]:
        done = original(*args, **options)
        if isinstance(done[1], Exception):
            _failed.append(done[1])
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


@dataclass
class _Comparison:
    """Compares what a reader reads with the records of its folder."""

    folder: Path
    items: dict[tuple[str, int], StoredItem]
    # Items that were compared once are not again: a resharded load reads a tensor for each of its parts.
    compared: set[tuple[str, int]] = field(default_factory=set)
    now: tuple[str, int] | None = None
    damaged: str | None = None
    pool: ThreadPoolExecutor | None = None
    pending: Future | None = None

    def starts(self, name: str, offset: int, file: IO[bytes]) -> None:
        """An item is about to be read; an object is compared here."""
        key = (name, offset)
        self.now = key if key in self.items and key not in self.compared else None
        if self.now and not (item := self.items[key]).is_tensor:
            file.seek(item.offset)
            self.compare(key, xxhash.xxh3_128(file.read(item.length)).hexdigest())
            self.now = None

    def tensor(self, tensor: Tensor) -> None:
        """What was read of the item."""
        key, self.now = self.now, None
        if key is None:
            return
        if tensor.nbytes < THREADED_BYTES:
            self.compare(key, sum_of_tensor(tensor))
            return
        # One tensor at a time: those that wait for their sum stay in memory.
        self.finish()
        if self.pool is None:
            self.pool = ThreadPoolExecutor(1)
        self.pending = self.pool.submit(lambda: self.compare(key, sum_of_tensor(tensor)))

    def compare(self, key: tuple[str, int], found: str) -> None:
        """Note the first item that differs."""
        self.compared.add(key)
        if found != self.items[key].xxh3:
            name, offset = key
            self.damaged = self.damaged or (
                f"{self.folder / name} is damaged: its content at byte {offset:,} is not what was written (its "
                f"checksum differs)"
            )

    def finish(self) -> None:
        """Wait for the sum that is being formed."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


_reading = threading.local()
_BESIDE = "_sums_of_this_checkpoint"


@contextmanager
def _compared(reader: FileSystemReader) -> Iterator[None]:
    """Compare what the reader reads in the body.

    Raises:
        UsageError: something is not what was written; a record that cannot be read.
    """
    comparison = vars(reader).get(_BESIDE)
    if comparison is None:
        folder = Path(reader.path)
        files = read_records(folder)
        items = {(name, item.offset): item for name, file in files.items() for item in file.items}
        comparison = vars(reader)[_BESIDE] = _Comparison(folder, items)
    before, _reading.comparison = getattr(_reading, "comparison", None), comparison
    try:
        yield
        comparison.finish()
    finally:
        _reading.comparison = before
        if comparison.pool is not None:
            comparison.pool.shutdown()
            comparison.pool = comparison.pending = None
    if comparison.damaged:
        raise UsageError(comparison.damaged)


def _comparing(original: Callable) -> Callable:
    @wraps(original)
    def read_data(self: FileSystemReader, plan: Any, planner: Any) -> Any:
        with _compared(self):
            return original(self, plan, planner)

    return read_data


def _noting(original: Callable) -> Callable:
    @wraps(original)
    def _slice_file(self: FileSystemReader, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        if (comparison := getattr(_reading, "comparison", None)) is not None:
            comparison.starts(sinfo.relative_path, sinfo.offset, file)
        return original(self, file, sinfo)

    return _slice_file


def _summing(original: Callable) -> Callable:
    @wraps(original)
    def narrow_tensor_by_index(tensor: Tensor, offsets: Any, sizes: Any) -> Tensor:
        if (comparison := getattr(_reading, "comparison", None)) is not None:
            comparison.tensor(tensor)
        return original(tensor, offsets, sizes)

    return narrow_tensor_by_index


WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
READER = "torch.distributed.checkpoint.filesystem"
SAVING = (
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
LOADING = (
    Patch(
        f"{READER}:FileSystemReader.read_data",
        _comparing,
        why="what a checkpoint holds is compared with what was written",
        expects="(self, plan, planner)",
    ),
    Patch(
        f"{READER}:FileSystemReader._slice_file",
        _noting,
        why="the comparison must know which item of a checkpoint is read",
        expects="(self, file, sinfo)",
    ),
    Patch(
        f"{READER}:narrow_tensor_by_index",
        _summing,
        why="a tensor of a checkpoint is compared when it is read and before a part is taken",
        expects="(tensor, offsets, sizes)",
    ),
)
PATCHES = (*SAVING, *LOADING)


def patches(contents: bool) -> tuple[Patch, ...]:
    """Records of every checkpoint that is saved; with sums of contents or sizes alone."""
    recording, noting, common = SAVING
    return recording.given(contents), noting, common.given(contents)
