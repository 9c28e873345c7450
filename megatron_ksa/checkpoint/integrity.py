"""Sizes and checksums of a checkpoint's files, stored when it is saved and compared when it is loaded.

Each rank writes `.files_RANK.json` for the shards that it wrote, with a sum of each tensor and object; the first rank
writes `.files_common.json` for `.metadata` and `metadata.json` when everything else is there. XXH3 (128 bits) finds
damage; it is no signature. A checkpoint without such files, from an older version or from elsewhere, is checked by what
its own metadata says of sizes.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small
from megatron_ksa.upstream.checkpoint_records import CONFIG, METADATA, StoredFile, read_records, sum_of, sum_of_part


def is_distributed(folder: Path) -> bool:
    """Whether an iteration's folder holds a distributed checkpoint.

    Raises:
        UsageError: its metadata.json is damaged.
    """
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / CONFIG} is damaged ({type(error).__name__}); {way_out(folder)}") from None


def stored_files(folder: Path) -> dict[str, StoredFile]:
    """Every file that the records of a checkpoint name, or that its metadata says there must be.

    Raises:
        UsageError: a record or the metadata that cannot be read.
    """
    files = read_records(folder)
    for name in (METADATA, CONFIG):
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is missing")
    _check_config(folder / CONFIG)
    for name, size in _sizes_by_metadata(folder).items():
        files.setdefault(name, StoredFile(size))
    return files


def _check_config(path: Path) -> None:
    try:
        content = json.loads(read_small(path))
    except (UsageError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")


def _sizes_by_metadata(folder: Path) -> dict[str, int]:
    """The least size of each shard, by the extents of what lies in it."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except UsageError:
        raise
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError, TypeError, KeyError, IndexError,
            ImportError, MemoryError) as error:  # fmt: skip
        raise UsageError(f"{folder / METADATA} is damaged ({type(error).__name__}: {error})") from None
    sizes: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
    return sizes


def damage(folder: Path, *, contents: bool = True, items: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the first damaged file of a checkpoint.

    Args:
        folder: of one iteration.
        contents: compare checksums too, where they are stored.
        items: also those of tensors and objects, which a load compares by itself.
        share: this process's number and how many processes check parts of the checkpoint.

    Returns:
        A clause that names the file, or None where everything is as it was written.
    """
    try:
        files = stored_files(folder)
    except UsageError as error:
        return str(error)
    mine = sorted(files.items())[share[0] :: share[1]]
    if problem := next(filter(None, (_wrong_size(folder / name, file) for name, file in mine)), None):
        return problem
    for name, file in mine if contents else ():
        if (file.xxh3 and sum_of(folder / name) != file.xxh3) or (items and not _items_are_whole(folder / name, file)):
            return f"{folder / name} is damaged: its content is not what was written (its checksum differs)"
    return None


def _items_are_whole(path: Path, file: StoredFile) -> bool:
    with open(path, "rb") as stream:
        return all(sum_of_part(stream, item.offset, item.length) == item.xxh3 for item in file.items)


def _wrong_size(path: Path, file: StoredFile) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if size < file.bytes or ((file.xxh3 or file.items) and size != file.bytes):
        return f"{path} is damaged: it has {size:,} of its {file.bytes:,} bytes"
    return None


def is_iteration(text: str) -> bool:
    """Whether a text is an iteration's number: ASCII digits, not more than fit 64 bits."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def iterations(root: Path) -> Iterator[tuple[int, Path]]:
    """Iterations under a `--save` folder, the newest first."""
    found = [(int(path.name[5:]), path) for path in root.glob("iter_*") if is_iteration(path.name[5:])]
    yield from sorted(found, reverse=True)


def newest_whole(root: Path, *, without: Path | None = None) -> int | None:
    """The newest iteration under a `--save` folder of which nothing is damaged; contents are compared."""
    return next((number for number, path in iterations(root) if path != without and damage(path) is None), None)


def way_out(folder: Path) -> str:
    """What to do about a damaged checkpoint, as a clause."""
    number = newest_whole(folder.parent, without=folder)
    if number is None:
        return "no other whole checkpoint is there"
    return f"the newest whole checkpoint is iteration {number}: take it with --ckpt-step {number}"
