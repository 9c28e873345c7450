"""Parquet files as documents: one column as text, or whole rows as JSON.

Cells are read as bytes and decoded where other documents are, so that a cell that is not UTF-8 is a bad document with
its row, and no other type than text is ever made into text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ksa.data_tools.documents import INVALID_UTF8, TOO_LARGE, BadDocument, RawDocument
from megatron_ksa.errors import UsageError

if TYPE_CHECKING:
    from pyarrow import Array, DataType, parquet

# Rows decoded at once. Few, since a dictionary can make one long cell many.
BATCH_ROWS = 64


@contextmanager
def _opened(path: Path) -> Iterator["parquet.ParquetFile"]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UsageError(f"{path}: reading Parquet needs a package: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as table:
            yield table
    # A damaged file can also claim sizes and names that Python refuses.
    except (ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UsageError(f"{path}: not a Parquet file that can be read ({error})") from None


def _check_rows(path: Path, table: "parquet.ParquetFile", column: str | None, limit: int) -> None:
    """Refuse row groups whose rows cannot all be within the limit, before one of them is held in memory."""
    metadata = table.metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        if not rows.num_rows:
            continue
        for i in range(rows.num_columns):
            chunk = rows.column(i)
            name = chunk.path_in_schema
            if column is not None and name != column and not name.startswith(f"{column}."):
                continue
            # A value, its length and level: 16 bytes are ample.
            if chunk.total_uncompressed_size > rows.num_rows * (limit + 16) + (1 << 20):
                average = chunk.total_uncompressed_size // rows.num_rows
                raise UsageError(
                    f"{path}: rows of row group {group + 1} have {average:,} bytes in column {name!r} on "
                    f"average, more than {limit:,}"
                )


def _binary(column: "Array") -> "Array | None":
    """The cells as bytes, unchecked; None where the column is not text or bytes."""
    from pyarrow import compute, large_binary, types

    kind: DataType = column.type
    if types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    views = types.is_string_view(kind) or types.is_binary_view(kind)
    if types.is_string(kind) or types.is_binary(kind) or types.is_fixed_size_binary(kind) or views:
        return compute.cast(column, large_binary())
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return compute.cast(column, large_binary())
    return None


def read_text_column(path: Path, name: str, limit: int) -> Iterator[RawDocument]:
    """Every cell of a column of strings or bytes, a dictionary of such among them.

    Raises:
        UsageError: no such column or two, a column of another type, a damaged file.
    """
    with _opened(path) as table:
        schema = table.schema_arrow
        found = schema.get_all_field_indices(name)
        if len(found) != 1:
            count = "no column" if not found else f"{len(found)} columns"
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise UsageError(f"{path}: {count} {name!r} (--json-key); its columns: {columns}")
        _check_rows(path, table, name, limit)
        number, share = 0, path.stat().st_size / max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
            cells = _binary(batch.column(0)) if batch.num_columns else None
            if cells is None:
                kind = schema.field(found[0]).type
                raise UsageError(f"{path}: column {name!r} (--json-key) is {kind}, neither text nor bytes")
            for cell in cells:
                consumed, number = int((number + 1) * share) - int(number * share), number + 1
                content, problem = b"", None
                if not cell.is_valid:
                    problem = "no text", f"null in column {name!r}"
                elif (size := cell.as_buffer().size) > limit:
                    problem = TOO_LARGE, f"{size:,} bytes, more than {limit:,}"
                else:
                    content = cell.as_py()
                yield RawDocument(f"{path}:{number}", content, False, consumed, problem=problem)


def _json_value(value: Any) -> str:
    """What JSON has no type for: bytes as the text they are, times and decimals as they print."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadDocument(INVALID_UTF8, f"{error.reason} at byte {error.start} of a value of bytes") from None
    return str(value)


def _row(batch: Any, index: int) -> bytes:
    from pyarrow import ArrowException

    record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            raise BadDocument(INVALID_UTF8, f"{error.reason} at byte {error.start} of column {name!r}") from None
        # Times that Python cannot hold, zones it does not know, packages it lacks.
        except (ArrowException, ValueError, OverflowError, KeyError, ImportError) as error:
            raise BadDocument("unreadable value", f"column {name!r}: {error}") from None
    return json.dumps(record, ensure_ascii=False, default=_json_value).encode("utf-8", "surrogatepass")


def read_rows(path: Path, limit: int) -> Iterator[RawDocument]:
    """Every row as a JSON object of its columns.

    Raises:
        UsageError: two columns of one name, a damaged file.
    """
    with _opened(path) as table:
        names = table.schema_arrow.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{path}: more than one column is called {twice!r}")
        _check_rows(path, table, None, limit)
        number, share = 0, path.stat().st_size / max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            for index in range(batch.num_rows):
                consumed, number = int((number + 1) * share) - int(number * share), number + 1
                content, problem = b"", None
                try:
                    content = _row(batch, index)
                except BadDocument as error:
                    problem = error.reason, error.detail
                if len(content) > limit:
                    content, problem = b"", (TOO_LARGE, f"{len(content):,} bytes, more than {limit:,}")
                yield RawDocument(f"{path}:{number}", content, True, consumed, problem=problem)
