"""Data of the released KSA training code: tokens, documents and masks come over as they are, or one line refuses them.

The files here are written from the format as `released.py` describes it; none is published.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from run_tool import refusal, run_tool

from megatron_ksa.data_tools import released
from megatron_ksa.data_tools.tokenizers import write_byte_level

END = 256
RANDOM = np.random.default_rng(0)
DOCUMENTS = [np.append(RANDOM.integers(0, 256, size), END) for size in (5, 1, 300, 17)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    write_byte_level(folder)
    return folder


def write(prefix: Path, ids: np.ndarray, kind: str = "uint32", mask: np.ndarray | None = None) -> Path:
    ids.astype(kind).tofile(f"{prefix}.bin")
    Path(f"{prefix}.bin.meta").write_text(kind)
    if mask is not None:
        mask.astype(kind).tofile(f"{prefix}_loss_mask.bin")
    return Path(f"{prefix}.bin")


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def convert(source: Path, output: Path, tokenizer: Path, *more: object):
    return run_tool(
        "preprocess_data.py", "--input", source, *more, "--output-prefix", output, "--tokenizer-model", tokenizer
    )


@pytest.mark.parametrize("kind", ["uint16", "int32", "uint32", "int64"])
def test_documents_end_where_their_end_is(kind, tokenizer, tmp_path, monkeypatch):
    """No end is added to a last document without one, and none is taken from a text's bytes."""
    monkeypatch.setattr(released, "BLOCK_TOKENS", 16)  # documents lie across blocks
    tail = np.array([1, 2, 3])
    source = write(tmp_path / "in", np.concatenate([*DOCUMENTS, tail]), kind)
    done = convert(source, tmp_path / "out", tokenizer)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out") == [document.tolist() for document in (*DOCUMENTS, tail)]
    assert not (tmp_path / "out_loss_mask.idx").exists()


def test_masks_come_with_their_tokens(tokenizer, tmp_path):
    """A mask says which tokens count as labels, in the type of the ids; documents without one count everywhere."""
    masks = [(np.arange(len(document)) % 3 == 0).astype(int) for document in DOCUMENTS]
    source = write(tmp_path / "in", np.concatenate(DOCUMENTS), mask=np.concatenate(masks))
    (tmp_path / "more.jsonl").write_text('{"text": "abc"}\n')
    done = convert(source, tmp_path / "out", tokenizer, tmp_path / "more.jsonl")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out")[:4] == [document.tolist() for document in DOCUMENTS]
    assert read(tmp_path / "out_loss_mask") == [*(mask.tolist() for mask in masks), [1] * 4]


def test_file_without_an_end_of_document_comes_in_pieces(tokenizer, tmp_path, monkeypatch):
    """It would be one document of all its tokens, and be held in memory whole."""
    monkeypatch.setattr(released, "PIECE_TOKENS", 100)
    monkeypatch.setattr(released, "BLOCK_TOKENS", 70)
    ids = RANDOM.integers(0, 256, 250)
    assert convert(write(tmp_path / "in", ids), tmp_path / "out", tokenizer).returncode == 0
    pieces = read(tmp_path / "out")
    assert [len(piece) for piece in pieces] == [100, 100, 50] and np.array_equal(np.concatenate(pieces), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "in.bin.meta").unlink(), "in.bin.meta is missing"),
        (lambda folder: (folder / "in.bin.meta").write_text("float32"), "'float32' is none of uint8, "),
        (lambda folder: (folder / "in.bin.meta").write_text("x" * 100), "more than 64 bytes"),
        (lambda folder: (folder / "in.bin").write_bytes(bytes(7)), "7 bytes are no whole number of uint32 ids"),
        (lambda folder: (folder / "in.bin.meta").write_text("uint16"), "token 0 is 4,464, but .* another type than"),
        (lambda folder: write(folder / "in", np.array([1, 300, 2])), "token 1 is 300, but .* has 257 tokens"),
        (lambda folder: write(folder / "in", np.array([1, -2]), "int64"), "token 1 is -2"),
        (lambda folder: write(folder / "in", np.array([1, 2]), mask=np.array([1])), "not written together"),
        (lambda folder: write(folder / "in", np.array([1, 2]), mask=np.array([1, 2])), "a mask is 0 or 1"),
    ],
)
def test_refused(change, message, tokenizer, tmp_path):
    write(tmp_path / "in", np.array([70000, END]), "uint32")
    change(tmp_path)
    before = sorted(tmp_path.iterdir())
    line = refusal(convert(tmp_path / "in.bin", tmp_path / "out", tokenizer))
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before
