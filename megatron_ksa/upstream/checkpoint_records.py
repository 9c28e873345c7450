"""Records of what a checkpoint's files are like: sizes, and XXH3-128 sums of the tensors and objects in them."""

import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

import torch
import xxhash

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small, whole_file

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
        """Bytes of the tensor's elements."""
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
