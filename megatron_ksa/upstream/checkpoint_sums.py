"""Sums of what a checkpoint holds, formed from memory while it is written.

Megatron 0.19.2 can hash a checkpoint: SHA-256 of every file of every rank, read again by the first rank. Here each
rank's writer stores a record with XXH3-128 sums of the tensors and objects that it writes. A sum is formed block by
block, just before the system copies the block, while it is in the processor's cache: 49 GB/s, where memory gives 17. It
takes the place of torch's CRC-32 (2 GB/s), which no load compares. `checkpoint_comparison` compares while reading: no
file is read for its sum alone.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small, whole_file
from megatron_ksa.upstream.patches import Patch

PREFIX, COMMON, CONTENT = ".files_", ".files_common.json", "content"
CONFIG, METADATA = "metadata.json", ".metadata"
BLOCK = 1 << 18
# A record has about a hundred bytes for each tensor that a rank writes.
RECORD_BYTES = 1 << 28


@dataclass(frozen=True)
class StoredItem:
    """A tensor or an object in a file, as torch.save wrote it.

    Attributes:
        offset: of its first byte in the file.
        length: bytes.
        xxh3: XXH3-128 of these bytes, in hexadecimal.
        start: where a tensor's elements start, counted from the offset: they follow one another in the order of
            `shape`. None of an object, and of a tensor that is stored in another order.
        dtype: of the tensor, as torch prints it ("torch.bfloat16").
        shape: of the tensor.
    """

    offset: int
    length: int
    xxh3: str
    start: int | None = None
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @classmethod
    def read(cls, row: list) -> "StoredItem":
        """An item from a record.

        Raises:
            ValueError: elements that do not lie in the item.
        """
        item = cls(*row[:5], shape=tuple(row[5]))
        if item.start is not None and not 0 <= item.start <= item.length - item.nbytes:
            raise ValueError(f"{item.nbytes} bytes of elements in an item of {item.length}")
        return item

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype: {self.dtype}")
        return dtype

    @property
    def nbytes(self) -> int:
        """Of the tensor's elements."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written: bytes, and the sum of its content or of each item in it (none where sums were off)."""

    bytes: int
    xxh3: str | None = None
    items: tuple[StoredItem, ...] = ()


def write_record(path: Path, files: dict[str, StoredFile]) -> None:
    """Store what files of a checkpoint are like, in a record beside them; the record has a sum of itself."""
    rows = {
        name: {"bytes": file.bytes, "xxh3": file.xxh3, CONTENT: [astuple(item) for item in file.items]}
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
                # Earlier versions have "items" with sums of another kind: of their files sizes alone are compared.
                items = tuple(StoredItem.read(item) for item in row.get(CONTENT, ()))
                files[str(name)] = StoredFile(int(row["bytes"]), row["xxh3"], items)
        except (UsageError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{record} is damaged ({type(error).__name__}: {error})") from None
    return files


def sum_of(path: Path) -> str:
    """XXH3-128 of a file's content."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sum_of_part(file: IO[bytes], offset: int, length: int) -> str:
    """XXH3-128 of a part of a file; of what there is of it."""
    digest = xxhash.xxh3_128()
    file.seek(offset)
    while length and (block := file.read(min(BLOCK, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


class _Summed:
    """A stream that sums what is written to it, one item, before it goes on."""

    def __init__(self, stream: IO[bytes], data: object) -> None:
        self.stream, self.digest, self.written = stream, xxhash.xxh3_128(), 0
        self.start: int | None = None
        # Elements that are written as they lie in memory.
        self.elements = data if isinstance(data, Tensor) and data.is_contiguous() and data.nbytes else None

    def write(self, content: Any) -> int:
        """Write all of it."""
        content = memoryview(content)
        if self.elements is not None and content.nbytes == self.elements.nbytes:
            if np.frombuffer(content, np.uint8).ctypes.data == self.elements.data_ptr():
                self.start = self.written
        for at in range(0, len(content), BLOCK):
            block = content[at : at + BLOCK]
            self.digest.update(block)
            self.stream.write(block)
        self.written += len(content)
        return len(content)

    def tell(self) -> int:
        return self.stream.tell()

    def flush(self) -> None:
        self.stream.flush()


# What the save that this process is doing has written so far, by file and offset.
_written: dict[tuple[str, int], StoredItem] = {}


def _summing(original: Callable) -> Callable:
    @wraps(original)
    def _write_item(
        transforms: Any, stream: IO[bytes], data: Any, write_item: Any, storage_key: str, *rest: Any, **options: Any
    ) -> Any:
        summed = _Summed(stream, data)
        done = original(transforms, summed, data, write_item, storage_key, *rest, **options)
        offset, sum_of_item = done.storage_data.offset, summed.digest.hexdigest()
        item = StoredItem(offset, summed.written, sum_of_item)
        if summed.start is not None:
            item = StoredItem(offset, summed.written, sum_of_item, summed.start, str(data.dtype), tuple(data.shape))
        _written[storage_key, offset] = item
        return done

    return _write_item


@contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save leaves its CRC-32 out in the body: the writer's sums are there."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _recording(original: Callable, contents: bool) -> Callable:
    @wraps(original)
    def write_preloaded_data_multithread(
        transform_list: list, use_msc: bool, rank: int, write_buckets: list, global_results_queue: Any
    ) -> None:
        if use_msc:  # no files
            return original(transform_list, use_msc, rank, write_buckets, global_results_queue)
        _failed.clear()
        _written.clear()
        with _without_crc() if contents else nullcontext():
            recorded = _Recorded(global_results_queue, rank, write_buckets)
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
        files = {}
        for place, bucket in enumerate(self.write_buckets):
            path = Path(bucket[0])
            places = [(done.storage_data.relative_path, done.storage_data.offset) for done in results[place]]
            items = tuple(_written[at] for at in places if at in _written)
            files[path.name] = StoredFile(path.stat().st_size, None, items)
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
    Patch(
        f"{WRITER}:_write_item",
        _summing,
        why="sums of a checkpoint's tensors and objects are formed while they are written",
        expects="(transforms, stream, data, write_item, storage_key, serialization_format)",
    ),
)


def patches(contents: bool) -> tuple[Patch, ...]:
    """Records of every checkpoint that is saved; with sums of contents or sizes alone."""
    recording, noting, common, summing = PATCHES
    return recording.given(contents), noting, common.given(contents), *((summing,) if contents else ())
