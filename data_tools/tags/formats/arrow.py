"""Rows of Arrow tables as Hugging Face `datasets` keeps them: the files of a `save_to_disk` folder."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ksa.data_tools.documents import RawDocument
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

ARROW_SUFFIX = ".arrow"
STATE, SPLITS = "state.json", "dataset_dict.json"


def _json(path: Path) -> dict:
    try:
        content = json.loads(read_small(path, limit=LIST_BYTES))
    except (UsageError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}; save the dataset again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: no JSON object; save the dataset again")
    return content


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that `save_to_disk` wrote, in order; None for another folder.

    Raises:
        UsageError: it holds several splits, or files are missing.
    """
    if (folder / SPLITS).is_file():
        splits = _json(folder / SPLITS).get("splits", [])
        if not isinstance(splits, list) or len(splits) != 1:
            splits = splits if isinstance(splits, list) else []
            names = ", ".join(map(str, splits)) or "none"
            raise UsageError(f"{folder}: holds the splits {names}; name one, as {folder}/SPLIT")
        folder = folder / str(splits[0])
    if not (folder / STATE).is_file():
        return None
    listed = _json(folder / STATE).get("_data_files", [])
    if not isinstance(listed, list) or not all(isinstance(file, dict) for file in listed):
        raise UsageError(f"{folder / STATE}: _data_files is no list of objects; save the dataset again")
    files = [folder / str(file.get("filename")) for file in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UsageError(f"{folder}: {', '.join(missing) or 'no file'} of {STATE} is missing; save it again")
    if (folder / "indices.arrow").exists() or _json(folder / STATE).get("_indices_data_files"):
        raise UsageError(f"{folder}: saved with an indices mapping; flatten_indices() and save it again")
    return files


def _as_json(value: object) -> object:
    """What JSON has no form for: bytes as text (bad UTF-8 stays bad, and is told later), dates and the like as text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def row_payload(row: dict) -> bytes:
    """A row as the bytes of a JSON object."""
    return json.dumps(row, ensure_ascii=False, default=_as_json).encode("utf-8", "surrogateescape")


def arrow_rows(path: Path) -> Iterator[RawDocument]:
    """The rows of an Arrow file (stream or file format).

    Raises:
        UsageError: no Arrow file, or a damaged one.
    """
    try:
        import pyarrow
        from pyarrow import ipc
    except ModuleNotFoundError:
        raise UsageError(f"{path}: reading Arrow needs a package: pip install pyarrow") from None
    number, read, size = 0, 0, path.stat().st_size
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches = ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                table = ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            for batch in batches:
                for first in range(batch.num_rows):
                    number += 1
                    try:
                        payload = row_payload(batch.slice(first, 1).to_pylist()[0])
                    except UnicodeDecodeError as error:
                        payload = error.object  # not UTF-8, which parsing tells with its place
                    consumed = min(len(payload), size - read)
                    read += consumed
                    yield RawDocument(f"{path}:{number}", payload, is_json=True, bytes_read=consumed)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not an Arrow file that can be read ({error})") from None
