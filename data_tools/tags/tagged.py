"""Tagged instances in order: rows of `tags.jsonl` beside their records, as they lie in the files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.files import lines_of, read_jsonl, row_of
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.errors import UsageError

DUPLICATES = "duplicates.jsonl"
_ID = b'{"id": "'
_AFTER_ID = b'", "tags": '


@dataclass(frozen=True, slots=True)
class TaggedLine:
    """A tagged instance as it lies in the files.

    Args:
        line: of `records.jsonl`, from 0.
        offset: where that line begins, bytes.
        record, tags: the lines of `records.jsonl` and `tags.jsonl`.
    """

    line: int
    offset: int
    record: bytes
    tags: bytes


def _same_id(record: bytes, tags: bytes) -> bool:
    """Whether two lines have one id. Both begin with it, written alike, so it need not be parsed."""
    end = tags.find(_AFTER_ID)
    if end > 0 and record.startswith(_ID) and tags.startswith(_ID):
        return record.startswith(tags[: end + 1])
    return _id(record, RECORDS) == _id(tags, TAGS)


def _id(line: bytes, name: str) -> object:
    row = row_of(line, name)
    if "id" not in row:
        raise UsageError(f"{name}: a row without id; run the step that writes the file again")
    return row["id"]


def tagged_lines(folder: Path) -> Iterator[TaggedLine]:
    """Every tagged instance, in order.

    Raises:
        UsageError: a file is missing, or `tags.jsonl` does not follow `records.jsonl`.
    """
    for name in (RECORDS, TAGS):
        if not (folder / name).is_file():
            next(read_jsonl(folder / name))  # raises
    with open(folder / RECORDS, "rb") as records, open(folder / TAGS, "rb") as rows:
        tagged = lines_of(rows, folder / TAGS)
        row, offset = next(tagged, b""), 0
        for line, record in enumerate(lines_of(records, folder / RECORDS)):
            if row and _same_id(record, row):
                yield TaggedLine(line, offset, record, row)
                row = next(tagged, b"")
            offset += len(record)
        if row:
            raise UsageError(
                f"{folder / TAGS}: id {_id(row, TAGS)!r} is not in {RECORDS} in this order; run the tag step again"
            )


def kept_lines(folder: Path) -> Iterator[TaggedLine]:
    """Every tagged instance that is no duplicate, in order.

    Raises:
        UsageError: as `tagged_lines`, or `duplicates.jsonl` does not follow `tags.jsonl`.
    """
    left_out = read_jsonl(folder / DUPLICATES)
    gone = _id_bytes(next(left_out, None))
    for each in tagged_lines(folder):
        if gone is not None and each.tags.startswith(gone):
            gone = _id_bytes(next(left_out, None))
        else:
            yield each
    if gone is not None:
        raise UsageError(f"{folder / DUPLICATES} is not in the order of {TAGS}; run the tree step again")


def _id_bytes(row: dict | None) -> bytes | None:
    """How the line of a row of `tags.jsonl` with the same id begins."""
    return None if row is None else json.dumps({"id": row["id"]}, ensure_ascii=False)[:-1].encode() + b","


def kept_tags(folder: Path) -> Iterator[list[str]]:
    """Tags of every instance that is no duplicate."""
    return (json.loads(each.tags)["tags"] for each in kept_lines(folder))


def kept_texts(folder: Path, rows: np.ndarray | None = None) -> Iterator[str]:
    """Texts of instances that are no duplicates.

    Args:
        rows: bool [instances], those that are wanted; all by default.
    """
    for row, each in enumerate(kept_lines(folder)):
        if rows is None or rows[row]:
            yield record_text(json.loads(each.record))
