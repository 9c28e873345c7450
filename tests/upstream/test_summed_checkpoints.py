"""Sums of a checkpoint are formed from the bytes of its files; what is read by blocks is what torch's reader reads."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ksa.checkpoint.integrity import damage
from megatron_ksa.errors import UsageError
from megatron_ksa.upstream import checkpoint_comparison, checkpoint_records, checkpoint_sums
from megatron_ksa.upstream.patches import apply

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# More than a block, so that a sum has several; not a multiple of one.
ROWS, COLUMNS = 1000, 301
TENSORS = {
    "float32": torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS),
    "bfloat16": torch.arange(ROWS * COLUMNS, dtype=torch.bfloat16).reshape(ROWS, COLUMNS),
    "bool": torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 == 0,
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, COLUMNS),
    "transposed": torch.arange(ROWS * COLUMNS, dtype=torch.int64).reshape(COLUMNS, ROWS).t(),
}


class Reads(DefaultLoadPlanner):
    """Reads one part of one tensor into a given place."""

    def __init__(self, name: str, offsets: tuple[int, ...], target: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.name, self.offsets, self.target = name, offsets, target

    def create_local_plan(self) -> LoadPlan:
        part = ChunkStorageMetadata(torch.Size(self.offsets), self.target.size())
        return LoadPlan(
            create_read_items_for_chunk_list(self.name, self.metadata.state_dict_metadata[self.name], [part])
        )

    def resolve_tensor(self, read_item) -> Tensor:
        return self.target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    with checkpoint_sums.recorded(folder):
        dcp.save({**TENSORS, "object": {"key": [1, 2]}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def reader(folder) -> dcp.FileSystemReader:
    return dcp.FileSystemReader(folder)


@pytest.fixture
def compared():
    with apply(checkpoint_comparison.PATCHES):
        yield


def read(reader: dcp.FileSystemReader, name: str, offsets: tuple[int, ...], target: Tensor) -> Tensor:
    target.fill_(1)
    dcp.load({}, storage_reader=reader, planner=Reads(name, offsets, target), no_dist=True)
    return target


def items(folder: Path) -> list[checkpoint_records.StoredItem]:
    (file,) = checkpoint_records.read_records(folder).values()
    return sorted(file.items, key=lambda item: item.offset)


def test_tensors_are_recorded_with_their_place(folder):
    """All but what is empty, or stored in another order than that of its rows, can be read without torch."""
    stored = items(folder)
    assert len(stored) == len(TENSORS) + 1
    known = [item for item in stored if item.start is not None]
    assert sorted(item.dtype for item in known) == ["torch.bfloat16", "torch.bool", "torch.float32", "torch.float32"]
    content = (folder / "__0_0.distcp").read_bytes()
    (item,) = [item for item in known if item.dtype == "torch.bfloat16"]
    start = item.offset + item.start
    assert content[start : start + item.nbytes] == TENSORS["bfloat16"].view(torch.uint8).numpy().tobytes()
    assert item.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.usefixtures("compared")
def test_whole_tensors_are_read(name, reader):
    expected = TENSORS[name]
    target = torch.empty(expected.shape, dtype=expected.dtype)
    for _ in range(2):  # compared, and not again
        assert torch.equal(read(reader, name, (0,) * expected.dim(), target), expected)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "rows, columns", [((0, 1000), (0, 301)), ((7, 900), (0, 301)), ((0, 1000), (3, 17)), ((999, 1000), (300, 301))]
)
@pytest.mark.usefixtures("compared")
def test_parts_are_read(rows, columns, again, reader):
    """Resharded loads take rows, columns or both; another dtype and a target with gaps need a copy."""
    expected = TENSORS["float32"][slice(*rows), slice(*columns)]
    wide = torch.empty(expected.shape[0], 2 * expected.shape[1])
    for target in (torch.empty(expected.shape), torch.empty(expected.shape, dtype=torch.float64), wide[:, ::2]):
        if not again:
            vars(reader).pop("_sums_of_this_checkpoint", None)
        assert torch.equal(read(reader, "float32", (rows[0], columns[0]), target).float(), expected)


@pytest.mark.parametrize("rows", [(0, 1000), (0, 10), (500, 501)])
def test_each_flipped_byte_is_found(rows, folder, tmp_path, compared):
    """Headers, elements within and beyond the rows that are wanted, and the archive's directory are all compared."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = (folder / "__0_0.distcp").read_bytes()
    (item,) = [item for item in items(folder) if item.dtype == "torch.bfloat16"]
    for place in (0, item.start - 1, item.start, item.length // 2, item.start + item.nbytes - 1, item.length - 1):
        at = item.offset + place
        (copy / "__0_0.distcp").write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        target = torch.empty(rows[1] - rows[0], COLUMNS, dtype=torch.bfloat16)
        with pytest.raises(dcp.api.CheckpointException, match=f"content at byte {item.offset:,} is not what was"):
            read(dcp.FileSystemReader(copy), "bfloat16", (rows[0], 0), target)
        assert "__0_0.distcp is damaged: its content" in _damage_of_items(copy)


def _damage_of_items(folder: Path) -> str:
    (folder / "metadata.json").write_text("{}")
    return damage(folder) or ""


def test_a_file_that_ends_early_is_found(folder, tmp_path, compared):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (item,) = [item for item in items(folder) if item.dtype == "torch.float32" and item.shape]
    with open(tmp_path / "__0_0.distcp", "r+b") as file:
        file.truncate(item.offset + item.length // 2)
    with pytest.raises(dcp.api.CheckpointException, match=f"ends within the item at byte {item.offset:,}"):
        read(dcp.FileSystemReader(tmp_path), "float32", (0, 0), torch.empty(ROWS, COLUMNS))


def test_the_crc_of_torch_is_left_out_while_sums_are_formed(tmp_path):
    """It took 1.1 s of a save of 2 GB; no load compares it."""
    with checkpoint_sums.recorded(tmp_path):
        assert not torch.serialization.get_crc32_options()
        dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.serialization.get_crc32_options()


@pytest.mark.parametrize(
    "row, said",
    [([0, 10, "00", 5, "torch.float32", [2]], "8 bytes of elements in an item of 10"), ([0, 10], "IndexError"),
     ([0, 10, "00", 0, "torch.load", [2]], "no dtype: torch.load"), ([0, 10, "00", -1, "torch.int8", [1]], "1 bytes")],
)  # fmt: skip
def test_wrong_places_in_a_record_are_refused(row, said, tmp_path):
    rows = {"__0_0.distcp": {"bytes": 10, "xxh3": None, "content": [row]}}
    record = {"files": rows, "xxh3": checkpoint_records._sum_of_rows(rows)}
    (tmp_path / ".files_0.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=f".files_0.json is damaged.*{said}"):
        checkpoint_records.read_records(tmp_path)


def test_records_of_earlier_versions_give_sizes(tmp_path):
    """Their sums were of elements, not of a file's bytes."""
    rows = {"__0_0.distcp": {"bytes": 10, "xxh3": None, "items": [[0, 10, True, "00"]]}}
    record = {"files": rows, "xxh3": checkpoint_records._sum_of_rows(rows)}
    (tmp_path / ".files_0.json").write_text(json.dumps(record))
    assert checkpoint_records.read_records(tmp_path) == {"__0_0.distcp": checkpoint_records.StoredFile(10)}
