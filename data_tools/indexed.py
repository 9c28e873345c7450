"""Megatron's indexed datasets (`PREFIX.bin`, `PREFIX.idx`): written so that an interrupted run leaves none; checked.

`.idx` layout (megatron.core.datasets.indexed_dataset): 9-byte magic, version u64, dtype code u8, sequence count u64,
document count u64, then lengths i32, byte offsets i64, document boundaries i64, and for multimodal data modes i8.
"""

import contextlib
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.files import writing

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_DTYPE_BYTES = {code: dtype.itemsize for code, dtype in _DTYPES.items()}
# Entries read at a time.
_BLOCK = 1 << 20


def check_indexed_dataset(prefix: str) -> None:
    """Check that both files of a dataset are there and whole, and that every sequence lies where the one before ends.

    The index is read once (12 bytes a sequence), the tokens are not.

    Raises:
        UsageError: a missing file, a bad header, a sequence elsewhere than in its place, or a size that differs from
            what the index says.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise UsageError(f"--data-path {prefix}: {path} does not exist; tools/preprocess_data.py writes it")
    with open(index, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise UsageError(f"--data-path {prefix}: {index} is truncated; run tools/preprocess_data.py again")
        magic, version, dtype, sequences, documents = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or dtype not in _DTYPE_BYTES:
            raise UsageError(f"--data-path {prefix}: {index} is not an index of Megatron's indexed dataset")
        needed = _HEADER.size + sequences * 12 + documents * 8
        if index.stat().st_size not in (needed, needed + sequences):
            raise UsageError(
                f"--data-path {prefix}: {index} has {index.stat().st_size} bytes where its header tells {needed}: "
                "truncated; run tools/preprocess_data.py again"
            )
        if sequences == 0:
            raise UsageError(f"--data-path {prefix}: the dataset has no documents")
        needed = _check_sequences(prefix, stream, sequences, documents, _DTYPE_BYTES[dtype])
    if data.stat().st_size != needed:
        raise UsageError(
            f"--data-path {prefix}: {data} has {data.stat().st_size} bytes where its index tells {needed}: "
            "truncated or mixed up; run tools/preprocess_data.py again"
        )


def _check_sequences(prefix: str, stream: IO[bytes], sequences: int, documents: int, size: int) -> int:
    """Check lengths, offsets and document boundaries of an index; returns the bytes of its tokens.

    Args:
        size: bytes of a token.
    """
    end = 0
    for start in range(0, sequences, _BLOCK):
        count = min(_BLOCK, sequences - start)
        stream.seek(_HEADER.size + start * 4)
        lengths = np.fromfile(stream, "<i4", count).astype(np.int64)
        stream.seek(_HEADER.size + sequences * 4 + start * 8)
        offsets = np.fromfile(stream, "<i8", count)
        ends = end + np.cumsum(lengths) * size
        wrong = np.flatnonzero((lengths < 0) | (offsets != ends - lengths * size))
        if len(wrong):
            raise UsageError(
                f"--data-path {prefix}: {prefix}.idx is damaged, sequence {start + wrong[0]:,} is not where the one "
                "before it ends; run tools/preprocess_data.py again"
            )
        end = int(ends[-1])
    stream.seek(_HEADER.size + sequences * 12)
    last = -1
    for start in range(0, documents, _BLOCK):
        bounds = np.fromfile(stream, "<i8", min(_BLOCK, documents - start))
        if bounds[0] < last or np.any(np.diff(bounds) < 0) or bounds[-1] > sequences or (last < 0 and bounds[0] != 0):
            raise UsageError(
                f"--data-path {prefix}: {prefix}.idx is damaged, its documents do not follow one another; run "
                "tools/preprocess_data.py again"
            )
        last = int(bounds[-1])
    if last not in (-1, sequences):
        raise UsageError(f"--data-path {prefix}: {prefix}.idx is damaged, its documents end before its sequences do")
    return end


def id_range(prefix: str, most: int | None = None) -> tuple[int, int]:
    """The smallest and the largest token id of a dataset that `check_indexed_dataset` passed.

    Args:
        most: tokens to read, those that the dataset begins with; None for all of them.

    Returns:
        (0, -1) for a dataset without tokens.
    """
    with open(f"{prefix}.idx", "rb") as stream:
        dtype = _HEADER.unpack(stream.read(_HEADER.size))[2]
    smallest, largest = 0, -1
    with open(f"{prefix}.bin", "rb") as stream:
        while most is None or most > 0:
            ids = np.fromfile(stream, _DTYPES[dtype], _BLOCK if most is None else min(most, _BLOCK))
            if not len(ids):
                break
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
            most = None if most is None else most - len(ids)
    return smallest, largest


def check_ids(prefix: str, vocabulary: int, most: int | None = None) -> None:
    """Check that the model has a row for every id of a dataset.

    Args:
        most: tokens to read, those that the dataset begins with; None for all of them.

    Raises:
        UsageError: an id that is negative or beyond them.
    """
    smallest, largest = id_range(prefix, most)
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise UsageError(
            f"--data-path {prefix}: {prefix}.bin has the token id {wrong:,}, and the model has {vocabulary:,} rows "
            "for ids (--vocab-size or the tokenizer): give the tokenizer that the dataset was written with"
        )


def check_prefix(prefix: str) -> None:
    """Check a prefix to write a dataset under.

    Raises:
        UsageError: a folder, in which the files would have no name but their suffix.
    """
    if prefix.endswith("/") or not Path(prefix).name:
        raise UsageError(f"--output-prefix {prefix} is a folder: add what the files' names begin with, as {prefix}text")


def loss_mask_prefix(prefix: str) -> str:
    """Name of the dataset that tells which tokens of `prefix` count in the loss."""
    return f"{prefix}_loss_mask"


def sequence_lengths(prefix: str) -> np.ndarray:
    """int32 [sequences], tokens of each sequence of a dataset that `check_indexed_dataset` passed."""
    with open(f"{prefix}.idx", "rb") as stream:
        sequences = _HEADER.unpack(stream.read(_HEADER.size))[3]
        return np.fromfile(stream, np.dtype("<i4"), sequences)


class IndexedDatasetWriter:
    """Context manager that writes a dataset under temporary names and gives it its own only when it is whole.

    Two writers of one prefix are kept apart by `locks.exclusive(prefix, ...)` around them.

    Args:
        prefix: the dataset's path without `.bin` and `.idx`.
        vocab_size: every id is below it. It decides the token type, as Megatron does: uint16 where ids fit, int32
            otherwise.
        overwrite: replace a dataset of this name.
        dtype: the token type, where it shall be another one.
        check: called when all is written, before the dataset gets its name; what it raises leaves none
            (`locks.Lock.check`).

    Raises:
        UsageError: the dataset exists and `overwrite` is not given; a disk that is full or cannot be written to.
    """

    def __init__(
        self, prefix: str, vocab_size: int, *, overwrite: bool = False, dtype: type[np.integer] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's word on every optional package that is absent
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        self.index, self.data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        if not overwrite and self.index.exists():
            raise UsageError(f"{self.index} exists: pass --overwrite to replace it or choose another --output-prefix")
        self.partial_index, self.partial_data = Path(f"{prefix}.idx.partial"), Path(f"{prefix}.bin.partial")
        self.dtype = dtype or DType.optimal_dtype(vocab_size)
        if not np.issubdtype(self.dtype, np.integer):
            raise UsageError(f"{self.data}: token ids cannot be {np.dtype(self.dtype)}")
        self._largest, self._check = min(vocab_size - 1, int(np.iinfo(self.dtype).max)), check
        with writing(self.data):
            self.index.parent.mkdir(parents=True, exist_ok=True)
            # A run that was suspended may still have the old one open.
            self.partial_data.unlink(missing_ok=True)
            self._builder = IndexedDatasetBuilder(str(self.partial_data), dtype=self.dtype)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def add_document(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Append one document.

        Args:
            tokens: integers [tokens], each from 0 to below the vocabulary size.

        Raises:
            UsageError: an id that the dataset or the model's embedding cannot hold, a document of 2^31 tokens.
        """
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            given, tokens = tokens, tokens.astype(np.int64)
            if not np.array_equal(given, tokens):
                raise UsageError(f"{self.data}: tokens are {given.dtype}, not integers")
        if len(tokens) and (tokens.min() < 0 or tokens.max() > self._largest):
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise UsageError(
                f"{self.data}: a token id is {wrong:,}; this tokenizer's ids go from 0 to {self._largest:,}"
            )
        if len(tokens) >= 1 << 31:
            raise UsageError(f"{self.data}: a document has {len(tokens):,} tokens; an index holds lengths below 2^31")
        with writing(self.data):
            self._builder.add_document(tokens, [len(tokens)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.prepare()
                with writing(self.data):
                    self._publish()
        finally:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which the disk may refuse again
                self._builder.data_file.close()
            for path in (self.partial_data, self.partial_index):
                path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Write all that is to be written, so that only names are left to give.

        Call it on each of several writers before the first of them ends: a full disk then leaves none of the datasets.
        """
        if self._builder.data_file.closed:
            return
        with writing(self.data):
            self._builder.finalize(str(self.partial_index))
            for path in (self.partial_data, self.partial_index):
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
        if self._check is not None:
            self._check()

    def _publish(self) -> None:
        # A dataset without an index is not one: the old index goes first, the new one comes last.
        self.index.unlink(missing_ok=True)
        self.partial_data.replace(self.data)
        self.partial_index.replace(self.index)
