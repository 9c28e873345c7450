"""What is read of a checkpoint is compared with the sums in its records, tensor by tensor, while it is read.

torch 2.14's reader reads each tensor into newly allocated memory, and copies it from there. Tensors that a record
describes are read here: block by block to where they belong, each block summed while it is in the processor's cache.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import wraps
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from megatron_ksa.errors import UsageError
from megatron_ksa.upstream.checkpoint_records import BLOCK, StoredItem, read_records, sum_of_part
from megatron_ksa.upstream.patches import Patch

# Bytes that the system is asked to read before they are needed.
AHEAD = 32 * 2**20


class _Comparison:
    """Reads the tensors of a checkpoint, and compares what is read with the records of its folder.

    Raises:
        UsageError: a record that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = read_records(folder)
        self.items = {(name, item.offset): item for name, file in files.items() for item in file.items}
        # Name and offset of the items that were compared: a resharded load reads a tensor once for each of its parts.
        self.compared: set[tuple[str, int]] = set()
        self.scratch = memoryview(bytearray(BLOCK))
        self.staged = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str, wanted: list[tuple[StoredItem, ReadItem]], planner: LoadPlanner) -> list[ReadItem]:
        """Read the tensors that are wanted of a file, in the order in which they lie there.

        Returns:
            Requests that torch's reader serves: objects, and tensors in another order than their shape's. Their bytes
            have been compared here.

        Raises:
            UsageError: an item that is not what was written.
        """
        left = []
        with open(self.folder / name, "rb", buffering=0) as stream:
            file = _Ahead(stream)
            for item, request in sorted(wanted, key=lambda each: each[0].offset):
                if request.type == LoadItemType.BYTE_IO or item.start is None:
                    if (name, item.offset) not in self.compared:
                        self._check(name, item, sum_of_part(file.file, item.offset, item.length))
                    left.append(request)
                else:
                    self._read_tensor(name, file, item, request, planner)
        return left

    def _read_tensor(
        self, name: str, file: "_Ahead", item: StoredItem, request: ReadItem, planner: LoadPlanner
    ) -> None:
        target = planner.resolve_tensor(request).detach()
        rows = _rows(item, request, target)
        if rows is None:
            staged = self._staged(item)
            self._read_elements(name, file, item, _bytes(staged), 0)
            part = narrow_tensor_by_index(staged, request.storage_offsets, request.lengths)
            if target.size() != part.size():
                raise AssertionError(
                    f"req {request.storage_index} mismatch sizes {target.size()} vs {part.size()}"
                )  # as torch
            target.copy_(part)
        else:
            self._read_elements(name, file, item, _bytes(target), rows)
        planner.commit_tensor(request, target)

    def _staged(self, item: StoredItem) -> Tensor:
        """A buffer of the item's shape in memory that all items share: allocating it takes as long as reading."""
        if self.staged.nbytes < item.nbytes:
            self.staged = torch.empty(item.nbytes, dtype=torch.uint8)
        return self.staged[: item.nbytes].view(item.torch_dtype).reshape(item.shape)

    def _read_elements(self, name: str, file: "_Ahead", item: StoredItem, place: memoryview, first: int) -> None:
        """Fill `place` with the elements from byte `first` on.

        An item that was not compared yet is read whole, for its sum.
        """
        assert item.start is not None
        before, after = item.start + first, item.length - item.start - first - len(place)
        if (name, item.offset) in self.compared:
            file.seek(item.offset + before)
            return self._fill(name, file, item, place, None)
        digest = xxhash.xxh3_128()
        file.seek(item.offset)
        for length, part in ((before, None), (len(place), place), (after, None)):
            if part is not None:
                self._fill(name, file, item, part, digest)
            else:
                for at in range(0, length, BLOCK):
                    self._fill(name, file, item, self.scratch[: min(BLOCK, length - at)], digest)
        return self._check(name, item, digest.hexdigest())

    def _fill(self, name: str, file: Any, item: StoredItem, place: memoryview, digest: Any) -> None:
        at = 0
        while at < len(place):
            block = place[at : at + BLOCK]
            count = file.readinto(block)
            if not count:
                raise UsageError(f"{self.folder / name} is damaged: it ends within the item at byte {item.offset:,}")
            if digest is not None:
                digest.update(block[:count])
            at += count

    def _check(self, name: str, item: StoredItem, found: str) -> None:
        if found != item.xxh3:
            raise UsageError(
                f"{self.folder / name} is damaged: its content at byte {item.offset:,} is not what was written (its "
                f"checksum differs)"
            )
        self.compared.add((name, item.offset))


class _Ahead:
    """A file of which the system reads what comes next while the last block is summed.

    Items are read one after the other with small gaps. The system's own reading ahead would begin anew at each of them.
    """

    def __init__(self, file: FileIO) -> None:
        self.file, self.told = file, 0

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def readinto(self, block: memoryview) -> int | None:
        place = self.file.tell()
        if place + AHEAD > self.told and hasattr(os, "posix_fadvise"):
            begin = max(place, self.told)
            os.posix_fadvise(self.file.fileno(), begin, AHEAD, os.POSIX_FADV_WILLNEED)
            self.told = begin + AHEAD
        return self.file.readinto(block)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _rows(item: StoredItem, request: ReadItem, target: Tensor) -> int | None:
    """The byte of the elements from which on they fill the target one after another.

    None where they do not: another dtype, another device, parts of rows, sizes that differ.
    """
    if type(target) is not Tensor or target.device.type != "cpu" or target.dtype != item.torch_dtype:
        return None
    lengths, offsets = tuple(request.lengths), tuple(request.storage_offsets)
    if not target.is_contiguous() or tuple(target.shape) != lengths or len(lengths) != len(item.shape):
        return None
    if lengths[1:] != item.shape[1:] or any(offsets[1:]):
        return None
    if not lengths:
        return 0
    row = item.nbytes // item.shape[0] if item.shape[0] else 0
    return offsets[0] * row if 0 <= offsets[0] <= item.shape[0] - lengths[0] else None


_BESIDE = "_sums_of_this_checkpoint"


def _comparing(original: Callable) -> Callable:
    @wraps(original)
    def read_data(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        comparison = vars(self).get(_BESIDE)
        if comparison is None:
            comparison = vars(self)[_BESIDE] = _Comparison(Path(self.path))
        left: list[ReadItem] = []
        by_file: dict[str, list[tuple[StoredItem, ReadItem]]] = {}
        for request in plan.items:
            stored = self.storage_data[request.storage_index]
            item = comparison.items.get((stored.relative_path, stored.offset))
            if item is None:
                left.append(request)
            else:
                by_file.setdefault(stored.relative_path, []).append((item, request))
        for name, wanted in by_file.items():
            left += comparison.read(name, wanted, planner)
        comparison.staged = comparison.staged[:0].clone()
        return original(self, dataclasses.replace(plan, items=left), planner)

    return read_data


PATCHES = (
    Patch(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_data",
        _comparing,
        why="what a checkpoint holds is compared with what was written",
        expects="(self, plan, planner)",
    ),
)
