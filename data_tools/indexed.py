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

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.files import writing

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


def check_indexed_dataset(prefix: str) -> None:
    """Check that both files of a dataset are there and whole, reading only the index's header and last entries.

    Raises:
        UsageError: a missing file, a bad header, or a size that differs from what the index says.
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
        stream.seek(_HEADER.size + (sequences - 1) * 4)
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + sequences * 4 + (sequences - 1) * 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
    needed = last_offset + last_length * _DTYPE_BYTES[dtype]
    if data.stat().st_size != needed:
        raise UsageError(
            f"--data-path {prefix}: {data} has {data.stat().st_size} bytes where its index tells {needed}: "
            "truncated or mixed up; run tools/preprocess_data.py again"
        )


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
        if len(tokens) and not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(f"{self.data}: tokens are {tokens.dtype}, not integers")
        if len(tokens) and (tokens.min() < 0 or tokens.max() > self._largest):
            raise UsageError(
                f"{self.data}: a token id is {int(tokens.min() if tokens.min() < 0 else tokens.max()):,}; this tokenizer's "
                f"ids go from 0 to {self._largest:,}"
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

        Call it on each of several writers before the first of them ends: a full disk then leaves none of their datasets.
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
