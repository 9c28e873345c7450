"""Files of a pool: what `readers` reads (JSONL, JSON arrays, Parquet, text), and folders of Hugging Face's `datasets`.

`input_files` says which files there are, `read_raw` gives their documents, in order.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_ksa.data_tools import readers
from megatron_ksa.data_tools.documents import RawDocument
from megatron_ksa.data_tools.readers import JSONL_SUFFIXES, PARQUET_SUFFIX
from megatron_ksa.data_tools.tags.formats.arrow import ARROW_SUFFIX, arrow_rows, saved_files
from megatron_ksa.errors import UsageError

SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX)
TABLE_SUFFIXES = (PARQUET_SUFFIX, ARROW_SUFFIX)
# Shards of one file, as Hugging Face and others number them, and folders between a dataset's own and its shards.
_SHARD = re.compile(r"(?P<name>.+?)-\d{5}-of-\d{5}")
WITH_GLOB = "choose with --glob"
_INNER = {"data", "default", "train", "test", "validation", "valid", "dev"}


def source_name(path: Path) -> str:
    """The name of the data that a file belongs to.

    A file's name without the suffixes that tell its format; of numbered shards the dataset's folder; of a text file in
    a folder the folder's name.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            stem = path.name.removesuffix(suffix)
            shard = _SHARD.fullmatch(stem)
            if shard is None:
                return stem or path.name
            if shard["name"] not in _INNER:
                return shard["name"]
            return next((folder.name for folder in path.parents if folder.name and folder.name not in _INNER), stem)
    return path.parent.name or path.stem


def _of_one_split(folder: Path, files: list[Path], choose: str) -> list[Path]:
    """The files, after a check that their names tell one split: a test split is not to be trained on by accident."""
    names = {shard["name"] for file in files if (shard := _SHARD.fullmatch(file.name.partition(".")[0]))}
    splits = sorted(names & _INNER)
    if len(splits) > 1:
        which = f" '**/{splits[-1]}-*'" if choose == WITH_GLOB else " of one"
        raise UsageError(f"{folder}: holds the splits {', '.join(splits)}; {choose}{which}")
    return files


def _folder_files(folder: Path, pattern: str | None, choose: str) -> list[Path]:
    saved = saved_files(folder)
    if saved is not None:
        return saved
    if pattern is not None:
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not found:
            raise UsageError(f"{folder}: no file in this folder matches --glob {pattern!r}")
        return found
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    data = [file for file in files if file.name.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX))]
    texts = [file for file in files if file.suffix == ".txt"]
    if data and texts:
        raise UsageError(
            f"{folder}: holds text files and data files, such as {texts[0].name} and {data[0].name}; {choose}"
        )
    if not data and not texts:
        raise UsageError(
            f"{folder}: no .txt and no {', '.join((*JSONL_SUFFIXES, PARQUET_SUFFIX))} in this folder; {choose}"
        )
    return _of_one_split(folder, data, choose) or texts


def input_files(inputs: list[str], pattern: str | None = None, *, flag: str = "--input") -> list[Path]:
    """The files to read: files as named, of folders the sorted files in them.

    Args:
        pattern: which files of a folder; where it is None, its data files or else its text files.
        flag: what names the inputs, for errors; `--glob` is about `--input` and `--target` alone.

    Raises:
        UsageError: a path that does not exist, a file of another format, a folder without files or with several splits.
    """
    files: list[Path] = []
    for name in inputs:
        try:
            files += _files(Path(name), pattern, WITH_GLOB if flag == "--input" else "name the files")
        except UsageError as error:
            raise UsageError(f"{flag} {error}") from None
    for file in files:
        check_utf8(str(file), flag)
    return files


def check_utf8(text: str, flag: str) -> None:
    """Check that a name can be written into the files between the steps.

    Raises:
        UsageError: it is no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {text[:200]}: a name that is no UTF-8; rename it") from None


def _files(path: Path, pattern: str | None, choose: str) -> list[Path]:
    if path.is_dir():
        return _folder_files(path, pattern, choose)
    if path.is_file() and path.name.endswith(SUFFIXES):
        return [path]
    if path.is_file():
        raise UsageError(f"{path}: a file must be one of {', '.join(SUFFIXES)}; pass a folder for text")
    raise UsageError(f"{path}: no such file or folder")


def read_raw(files: list[Path], *, flag: str = "--input") -> Iterator[RawDocument]:
    """Every raw document of the files, in order.

    Args:
        flag: what named the files, for errors.

    Raises:
        UsageError: a file that is damaged, a format whose package is not installed.
    """
    for path in files:
        if not path.name.endswith(ARROW_SUFFIX):
            yield from readers.read_documents([path], flag=flag)
            continue
        try:
            yield from arrow_rows(path)
        except UsageError as error:
            raise UsageError(f"{flag} {error}") from None
