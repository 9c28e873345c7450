"""Files that are read whole are read within bounds: /dev/zero in the place of each is one line."""

import os
from pathlib import Path

import pytest

from megatron_ksa.checkpoint.integrity import damage
from megatron_ksa.checkpoint.load import TRACKER, find_checkpoint
from megatron_ksa.data_tools.tags import files
from megatron_ksa.data_tools.tags.constraints import ConstraintSettings
from megatron_ksa.data_tools.tags.manifest import MANIFEST, Manifest
from megatron_ksa.data_tools.tags.selection import read_summary
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.shards import INDEX, ShardReader
from megatron_ksa.training import blend


def endless(folder: Path, name: str) -> Path:
    """A file of more bytes than any bound, which costs no disk."""
    path = folder / name
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    return path


def whole_checkpoint(folder: Path) -> Path:
    (folder / "iter_0000001").mkdir()
    for name in (".metadata", "metadata.json"):
        (folder / "iter_0000001" / name).write_text("{}")
    return folder / "iter_0000001"


READERS = {
    "tracker": lambda folder: (endless(folder, TRACKER), find_checkpoint(folder)),
    "blend": lambda folder: blend._from_file(str(endless(folder, "blend"))),
    "blend of splits": lambda folder: blend._from_json(str(endless(folder, "blend"))),
    "index of shards": lambda folder: (endless(folder, INDEX), ShardReader(folder)),
    "ids": lambda folder: ConstraintSettings(always=str(endless(folder, "ids.txt"))).always_ids(),
    "manifest": lambda folder: (endless(folder, MANIFEST), Manifest(folder)),
    "summary": lambda folder: read_summary(endless(folder, "summary.json")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_end_is_one_line(name, tmp_path):
    """A blend file, an index of shards and a tracker were read until the memory was full."""
    with pytest.raises(UsageError, match="has more than .* bytes"):
        READERS[name](tmp_path)


def test_a_line_without_end_between_the_steps_of_tags(tmp_path, monkeypatch):
    """One line without end was read until the memory was full, and rows that are no objects were tracebacks."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 16)
    with pytest.raises(UsageError, match=r"records.jsonl:1: more than 65,536 bytes in a line"):
        list(files.read_jsonl(endless(tmp_path, "records.jsonl")))
    for content in (b"[1]\n", b"\xff\n", b"{", b"[" * 10_000):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(UsageError, match="rows.jsonl:1: .*run its step again"):
            list(files.read_jsonl(tmp_path / "rows.jsonl"))


def test_an_output_that_is_a_device_or_a_folder_is_refused(tmp_path):
    """With the right to, a tool replaced /dev/null by its file."""
    for path in (Path("/dev/null"), tmp_path, Path("")):
        with pytest.raises(UsageError, match="is no file that can be written or replaced"), files.whole_file(path):
            pass
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["metadata.json", ".files_0.json"])
def test_files_of_a_checkpoint(name, tmp_path, monkeypatch):
    folder = whole_checkpoint(tmp_path)
    monkeypatch.setattr("megatron_ksa.upstream.checkpoint_records.RECORD_BYTES", 1 << 20)
    endless(folder, name)
    assert f"{name}" in damage(folder) and "more than" in damage(folder)


@pytest.mark.parametrize("text", ["²", "٣", "1" * 30, "1\n2", "\ufeff"])
def test_trackers_that_are_no_number(text, tmp_path):
    """`²` is a digit to Python and no integer: a traceback."""
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(UsageError, match=TRACKER):
        find_checkpoint(tmp_path)
