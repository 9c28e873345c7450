"""Blends and splits: comments are no datasets, and what Megatron asserts without a word has file, line and rule."""

import argparse
import json
from pathlib import Path

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.errors import UsageError
from megatron_ksa.training.blend import blends_from_args, check_documents, check_split, dataset_prefixes
from megatron_ksa.training.flag_rules import check_start

CASES = Path(__file__).parent / "cases"
FLAGS = (
    "mock_data", "data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path",
    "per_split_data_args_path",
)  # fmt: skip


def flags(**given) -> argparse.Namespace:
    return argparse.Namespace(**{**dict.fromkeys(FLAGS), "mock_data": False, **given})


def test_a_run_without_data_is_refused():
    """Megatron took mock data: a run trained on noise, or ended in a line without a flag."""
    with pytest.raises(UsageError, match="no data is given: --data-path, .*--mock-data: give one of them"):
        check_start(flags(enable_msc=False))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data_path": ["a"]},
        {"data_path": ["a", "b"]},
        {"data_path": ["a", "b", "c"]},
        {"data_path": ["0.3", "a", "7e1", "b"]},
        {"train_data_path": ["1", "a", "2", "b"], "valid_data_path": ["c"]},
        {"train_data_path": ["1"]},
    ],
)
def test_good_blends_are_megatrons(given):
    args = flags(**given)
    assert repr(blends_from_args(args)) == repr(get_blend_and_blend_per_split(args))


def test_files_are_megatrons(tmp_path):
    (tmp_path / "blend").write_text("30 a\n70\tb\n")
    (tmp_path / "split").write_text(json.dumps({"train": ["1", "a", "2", "b"], "valid": "c", "test": None}))
    for args in (flags(data_args_path=tmp_path / "blend"), flags(per_split_data_args_path=tmp_path / "split")):
        assert repr(blends_from_args(args)) == repr(get_blend_and_blend_per_split(args))


def test_comments_and_byte_order_marks_are_no_datasets(tmp_path):
    """A commented line became words of the blend, and the error message was empty."""
    args = flags(data_args_path=str(CASES / "blend_with_comment.txt"))
    assert blends_from_args(args)[0] == (["data/books_text_document", "data/code_text_document"], [0.7, 0.3])
    (tmp_path / "blend").write_bytes(b"\xef\xbb\xbf0.7 a#b # 0.2 old\r\n0.3 c\r\n")
    assert dataset_prefixes(flags(data_args_path=str(tmp_path / "blend"))) == ["a#b", "c"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_path": "0 a 1 b".split()}, "--data-path, word 1: the weight is 0: a number above 0"),
        ({"data_path": "1 a -2 b".split()}, "--data-path, word 3: the weight is -2: "),
        ({"data_path": "1 a x b".split()}, "--data-path, word 3: the weight is x: "),
        ({"data_path": "1 a nan b".split()}, "--data-path, word 3: the weight is nan: "),
        ({"data_path": "1 a 1e999 b".split()}, "--data-path, word 3: the weight is 1e999: "),
        ({"data_path": "0.5 a b".split()}, "--data-path, word 1: 0.5 stands alone: give every dataset a weight"),
        ({"data_path": []}, "--data-path names no dataset"),
        ({"valid_data_path": "0 a".split()}, "--valid-data-path, word 1: the weight is 0"),
        ({"data_path": ["a"], "train_data_path": ["b"]}, "from --data-path and from --train-data-path, .*give one"),
        ({"data_path": ["a"], "data_args_path": "b"}, "from --data-path and from --data-args-path: give one of them"),
    ],
)
def test_bad_blends_are_refused(given, message):
    with pytest.raises(UsageError, match=message) as error:
        blends_from_args(flags(**given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "split.json is no JSON"),
        ("[1]", "split.json lacks train, valid, test"),
        ('{"train": ["a"], "test": null}', "split.json lacks valid"),
        ('{"train": 5, "valid": null, "test": null}', "split.json, train: a list or a text of weights"),
        ('{"train": "0 a", "valid": null, "test": null}', "split.json, train, word 1: the weight is 0"),
    ],
)
def test_bad_files_of_splits_are_refused(tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        blends_from_args(flags(per_split_data_args_path=str(tmp_path / "split.json")))


def test_a_weight_in_a_file_is_named_with_its_line():
    with pytest.raises(UsageError, match="blend_zero_weight.txt, line 1: the weight is 0: a number above 0"):
        blends_from_args(flags(data_args_path=str(CASES / "blend_zero_weight.txt")))


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "blend").write_bytes(b"0.5 \xff\xfe")
    with pytest.raises(UsageError, match="--data-args-path .*blend is not UTF-8"):
        blends_from_args(flags(data_args_path=str(tmp_path / "blend")))


@pytest.mark.parametrize("split", ["969, 30, 1", "100,0,0", "1", "0.9,.1", "+5,5.,0"])
def test_good_splits_are_read_alike_by_megatron(split):
    check_split(split)
    shares = [float(part) for part in split.split(",")]
    found = parse_and_normalize_split(split)
    assert found == pytest.approx([share / sum(shares) for share in [*shares, 0, 0][:3]])


@pytest.mark.parametrize("split", [
    "", "-1,1,0", "90,abc5,5", "0,0,0", "1,2,3,4", "1;2", "nan,1,1", "1,,2", "1e999", "1e2,1", "9e-1,1e-1",
    "\u0669,\u0661",
])  # fmt: skip
def test_bad_splits_are_refused(split):
    """Megatron takes the digits that it finds: `90,abc5,5` was 90,5,5 and `-1,1,0` was 1,1,0, and `1e2,1` is 1,2,1."""
    with pytest.raises(UsageError, match="--split .*: give up to three numbers of 0 or more"):
        check_split(split)


def dataset(path: Path, lengths: list[int]) -> str:
    with IndexedDatasetWriter(str(path), 100) as writer:
        for length in lengths:
            writer.add_document([1] * length)
    return str(path)


def test_a_split_without_documents_is_refused(tmp_path):
    """With fewer than 500 documents Megatron's default split gave none to the test set, and the start never ended."""
    few, more = dataset(tmp_path / "few", [5] * 344), dataset(tmp_path / "more", [5] * 600)
    with pytest.raises(UsageError, match="few has no text for the test split: --split 969, 30, 1 gives that 0 of its"):
        check_documents(flags(data_path=[more, few], split="969, 30, 1"))
    check_documents(flags(data_path=[more], split="969, 30, 1"))
    check_documents(flags(data_path=[few], split="90,10,0"))
    check_documents(flags(mock_data=True, split="969, 30, 1"))


def test_a_split_of_empty_documents_is_refused(tmp_path):
    full, empty = dataset(tmp_path / "full", [5, 5, 5]), dataset(tmp_path / "empty", [5, 5, 0])
    check_documents(flags(data_path=[full], split="1,1,1"))
    with pytest.raises(UsageError, match="empty has no text for the test split: --split 1,1,1 gives that 1 of its 3"):
        check_documents(flags(data_path=[empty], split="1,1,1"))
    nothing = dataset(tmp_path / "nothing", [0])
    check_documents(flags(train_data_path=[full], test_data_path=[empty]))
    with pytest.raises(UsageError, match="nothing has no text for the valid split: leave it out of --valid-data-path"):
        check_documents(flags(train_data_path=[full], valid_data_path=[nothing]))
