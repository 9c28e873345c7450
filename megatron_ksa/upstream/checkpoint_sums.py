"""Sums of what a checkpoint holds, formed from memory while it is written.

Megatron 0.19.2 can hash a checkpoint: SHA-256 of every file of every rank, read again by the first rank. Here each
rank's writer stores a record with XXH3-128 sums of the tensors and objects that it writes. A sum is formed block by
block, just before the system copies the block, while it is in the processor's cache: 49 GB/s, where memory gives 17. It
takes the place of torch's CRC-32 (2 GB/s), which no load compares. `checkpoint_comparison` compares while reading: no
file is read for its sum alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.upstream.checkpoint_records import (
    BLOCK,
    COMMON,
    CONFIG,
    METADATA,
    PREFIX,
    StoredFile,
    StoredItem,
    sum_of,
    write_record,
)
from megatron_ksa.upstream.patches import Patch, apply


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
            here = np.frombuffer(content, np.uint8).ctypes.data
            self.start = self.written if here == self.elements.data_ptr() else self.start
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


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Store the record of what torch's own writer, in this process alone, writes to a folder in the body."""
    _written.clear()
    with apply([SUMMING_OF_TORCH]), _without_crc():
        yield
    files = {
        name: StoredFile((folder / name).stat().st_size, None, tuple(_written[at] for at in _written if at[0] == name))
        for name in sorted({name for name, _ in _written})
    }
    write_record(folder / f"{PREFIX}0.json", files)


SUMMING_OF_TORCH = Patch(
    "torch.distributed.checkpoint.filesystem:_write_item",
    _summing,
    why="sums of a checkpoint's tensors and objects are formed while they are written",
    expects="(transforms, stream, data, write_item, storage_key, serialization_format)",
)
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
    replace(SUMMING_OF_TORCH, target=f"{WRITER}:_write_item"),
)


def patches(contents: bool) -> tuple[Patch, ...]:
    """Records of every checkpoint that is saved; with sums of contents or sizes alone."""
    recording, noting, common, summing = PATCHES
    return recording.given(contents), noting, common.given(contents), *((summing,) if contents else ())
