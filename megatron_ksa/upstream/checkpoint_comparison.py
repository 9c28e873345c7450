"""What is read of a checkpoint is compared with the sums in its records, tensor by tensor, while it is read."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import IO, Any

import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_ksa.errors import UsageError
from megatron_ksa.upstream.checkpoint_sums import StoredItem, read_records, sum_of_tensor
from megatron_ksa.upstream.patches import Patch

# Smaller tensors are summed at once: a thread is not worth its change of hands.
THREADED_BYTES = 1 << 20


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


READER = "torch.distributed.checkpoint.filesystem"
PATCHES = (
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
