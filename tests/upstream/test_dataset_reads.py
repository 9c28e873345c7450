"""Data files that are cut while they are read, and ids beyond the vocabulary: one line that names the file."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import DataLoader

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, check_ids
from megatron_ksa.errors import RankUsageError, UsageError, usage_errors_exit
from megatron_ksa.upstream import dataset_reads
from megatron_ksa.upstream.patches import apply

LENGTH, DOCUMENTS = 5000, 20


@pytest.fixture
def prefix(tmp_path) -> str:
    with IndexedDatasetWriter(str(tmp_path / "data"), 70_000) as writer:
        for document in range(DOCUMENTS):
            writer.add_document(np.full(LENGTH, document))
    return str(tmp_path / "data")


@pytest.fixture
def reads():
    with apply(dataset_reads.patches(DOCUMENTS)):
        yield


@pytest.mark.parametrize("mmap", [True, False])
def test_reads_are_the_files(mmap, prefix, reads):
    dataset = IndexedDataset(prefix, mmap=mmap)
    for document in (0, 7, DOCUMENTS - 1):
        assert np.array_equal(dataset[document], np.full(LENGTH, document, np.int32))
    assert len(dataset.get(3, offset=LENGTH - 2)) == 2
    assert [len(part) for part in dataset[2:4]] == [LENGTH, LENGTH]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("left", [0, 7, LENGTH * 4 * 3 + 2])
def test_a_cut_bin_is_named(mmap, left, prefix, reads):
    """A mapped file that was cut ended the process with a SIGBUS; without a map, memory was read as tokens."""
    dataset = IndexedDataset(prefix, mmap=mmap)
    os.truncate(f"{prefix}.bin", left)
    with pytest.raises(RankUsageError, match=r"data\.bin is shorter than when training started"):
        dataset[DOCUMENTS - 1]
    if left > LENGTH * 4:
        assert dataset[0][0] == 0


def test_a_cut_index_is_named(prefix, reads):
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.idx", 34)
    with pytest.raises(RankUsageError, match=r"data\.idx is shorter"):
        dataset[3]


def test_a_replaced_file_is_read_on(prefix, reads):
    """A writer that replaces the file takes nothing from those who have the old one open."""
    dataset = IndexedDataset(prefix)
    Path(f"{prefix}.bin.new").write_bytes(b"")
    os.replace(f"{prefix}.bin.new", f"{prefix}.bin")
    assert dataset[4][0] == 4


@pytest.mark.parametrize("kind", [GPTDataset, BlendedDataset])
def test_a_cut_index_of_samples_is_named(kind, tmp_path, reads):
    names = ("shuffle_index", "sample_index", "document_index", "dataset_index", "dataset_sample_index")
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.zeros(10_000, np.int64))
    dataset = SimpleNamespace(**{name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in names})
    read = GPTDataset._query_document_sample_shuffle_indices if kind is GPTDataset else BlendedDataset.__getitem__
    cut = "sample_index" if kind is GPTDataset else "dataset_sample_index"
    os.truncate(tmp_path / f"{cut}.npy", 4000)
    with pytest.raises(RankUsageError, match=f"/{cut}.npy is shorter"):
        read(dataset, 3)


def test_an_id_beyond_the_vocabulary_is_named(prefix):
    """It ended some iteration in an IndexError, on a GPU in an assertion of a kernel, that named neither."""
    with apply(dataset_reads.patches(DOCUMENTS - 1)), pytest.raises(RankUsageError) as raised:
        IndexedDataset(prefix)[DOCUMENTS - 1]
    place = LENGTH * (DOCUMENTS - 1)
    assert f"data.bin: token {place:,} is {DOCUMENTS - 1}, and the model has {DOCUMENTS - 1} rows" in str(raised.value)


def test_ids_are_checked_at_start_on_demand(prefix):
    """--check-token-ids."""
    check_ids(prefix, DOCUMENTS)
    with pytest.raises(UsageError, match=f"data.bin has the token id {DOCUMENTS - 1}, and the model has 19 rows"):
        check_ids(prefix, DOCUMENTS - 1)
    content = np.fromfile(f"{prefix}.bin", np.int32)
    content[-1] = -5
    content.tofile(f"{prefix}.bin")
    with pytest.raises(UsageError, match="has the token id -5"):
        check_ids(prefix, DOCUMENTS)


def test_the_line_of_a_loaders_worker_is_the_same(prefix, reads, capsys):
    """A worker's error reaches the trainer inside its traceback."""
    loader = DataLoader(IndexedDataset(prefix), num_workers=1, batch_size=None)
    os.truncate(f"{prefix}.bin", LENGTH * 4 * 2)
    with pytest.raises(SystemExit, match="2"), usage_errors_exit():
        for _ in loader:
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {prefix}.bin is shorter than when training started") and "Traceback" not in line
