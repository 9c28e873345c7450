"""Reads of a dataset's files that fail in one line: a file that was cut meanwhile, an id that the model has no row for.

Megatron maps `.bin`, `.idx` and the indices of samples into memory. Where one of these files is cut while it is mapped,
the next read of what is gone ends the process with a SIGBUS that names no file. Without maps (`--no-mmap-bin-files`)
what is gone is read as whatever the memory held.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from megatron_ksa.errors import RankUsageError
from megatron_ksa.upstream.patches import Patch

INDEXED = "megatron.core.datasets.indexed_dataset"


def _cut(path: object) -> RankUsageError:
    return RankUsageError(
        f"{path} is shorter than when training started: it was cut or written again; restore it (tools/preprocess_data"
        f".py writes .bin and .idx, and --data-cache-path is filled again when its files are deleted) and start again"
    )


def _checked(ids: np.ndarray, path: object, offset: int, vocabulary: int | None) -> np.ndarray:
    """The ids, when each of them has a row in the embedding."""
    if vocabulary is not None and len(ids) and ids.dtype.kind in "iu":
        wrong = ids.min() if ids.min() < 0 else ids.max()
        if not 0 <= wrong < vocabulary:
            place = offset // ids.itemsize + int(np.flatnonzero(ids == wrong)[0])
            raise RankUsageError(
                f"{path}: token {place:,} is {wrong:,}, and the model has {vocabulary:,} rows for ids: give the "
                f"tokenizer that the dataset was written with"
            )
    return ids


def _from_map(original: Callable, vocabulary: int | None) -> Callable:
    @wraps(original)
    def read(self: Any, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        ids = np.empty(int(count), dtype)
        left, at = memoryview(ids).cast("B"), int(offset)
        # A read of the file says where it ends; one of the map is a SIGBUS there.
        while len(left):
            done = os.preadv(self._bin_file_reader.fileno(), [left], at)
            if not done:
                raise _cut(self._bin_file_reader.name)
            left, at = left[done:], at + done
        return _checked(ids, self._bin_file_reader.name, int(offset), vocabulary)

    return read


def _from_file(original: Callable, vocabulary: int | None) -> Callable:
    @wraps(original)
    def read(self: Any, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        ids = original(self, dtype, count, offset)
        if os.path.getsize(self._bin_path) < offset + ids.nbytes:
            raise _cut(self._bin_path)
        return _checked(ids, self._bin_path, int(offset), vocabulary)

    return read


def _whole(array: object) -> None:
    """Refuse an array whose file is shorter than its map."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and mapped.size() < len(mapped):
        raise _cut(getattr(array, "filename", "a file of the dataset"))


def _index_entry(original: Callable) -> Callable:
    @wraps(original)
    def entry(self: Any, idx: int) -> Any:
        _whole(self.bin_buffer_mmap)
        return original(self, idx)

    return entry


def _sample(original: Callable) -> Callable:
    @wraps(original)
    def sample(self: Any, idx: int) -> Any:
        for array in (self.shuffle_index, self.sample_index, self.document_index):
            _whole(array)
        return original(self, idx)

    return sample


def _of_blend(original: Callable) -> Callable:
    @wraps(original)
    def sample(self: Any, idx: int) -> Any:
        for array in (self.dataset_index, self.dataset_sample_index):
            _whole(array)
        return original(self, idx)

    return sample


PATCHES = (
    # `given(vocabulary)`: rows of the model's embedding; None where their number is not known.
    Patch(
        f"{INDEXED}:_MMapBinReader.read",
        _from_map,
        why="a .bin that is cut while it is mapped ends training in a SIGBUS",
        expects="(self, dtype, count, offset)",
    ),
    Patch(
        f"{INDEXED}:_FileBinReader.read",
        _from_file,
        why="a .bin that is cut is read as what the memory held",
        expects="(self, dtype, count, offset)",
    ),
    Patch(
        f"{INDEXED}:_IndexReader.__getitem__",
        _index_entry,
        why="an .idx that is cut while it is mapped ends training in a SIGBUS",
        expects="(self, idx)",
    ),
    Patch(
        "megatron.core.datasets.gpt_dataset:GPTDataset._query_document_sample_shuffle_indices",
        _sample,
        why="an index of samples that is cut while it is mapped ends training in a SIGBUS",
        expects="(self, idx)",
    ),
    Patch(
        "megatron.core.datasets.blended_dataset:BlendedDataset.__getitem__",
        _of_blend,
        why="an index of a blend that is cut while it is mapped ends training in a SIGBUS",
        expects="(self, idx)",
    ),
)


def patches(vocabulary: int | None) -> tuple[Patch, ...]:
    """The reads of a run whose model has so many rows for ids."""
    mapped, file, *others = PATCHES
    return mapped.given(vocabulary), file.given(vocabulary), *others
