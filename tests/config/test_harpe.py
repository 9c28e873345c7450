"""HARPE's list of bases: what people write is read as written, or refused in one line."""

import json

import pytest

from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.errors import UsageError

ALL_NINES = "9" * 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ALL_NINES},1e4", "a base is from 1 to 1e.18"),
        (f"1e4,{'9' * 5000}", "a base is from 1 to 1e.18"),
        ("1e4,1e400", "a base is from"),
        ("1e4,inf", "a base is from"),
        ("1e4,-inf", "a base is a positive number"),
        ("nan,1e4", "a base is a positive number"),
        ("-1,1e4", "a base is a positive number"),
        ("0,1e4", "a base is a positive number"),
        ("0.5,1e4", "a base is from 1"),
        ("1e4,", "has '': a base"),
        ("1e4 1e5,2", "has '1e4 1e5'"),
        ("1e4,true", "has 'true'"),
        ("1e4", "has 1 bases, the model has 2 KV groups"),
    ],
)
def test_bad_lists(text, message):
    """A number of 400 digits ended in an OverflowError, in a list and in a file."""
    with pytest.raises(UsageError, match=f"--harpe-bases.*{message}") as refused:
        HarpeConfig(bases=text).resolve(2)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{ALL_NINES}, 10000]", "a base is at most 1e.18"),
        (f"[{'9' * 5000}, 10000]", "has '.9999.*a base is a positive number"),
        ("[1e999, 10000]", "a base is from"),
        ("[NaN, 10000]", "a base is a positive number"),
        ("[true, 10000]", "has True"),
        ('[[1], {"a": 2}]', "has .1."),
        ('{"other": [1, 2]}', "must be a list"),
        ('"10000 20000"', "must be a list"),
        ("null", "must be a list"),
        ("[" * 100_000, "a base is a positive number"),
        ("", "has 0 bases"),
        ("x" * 2_000_000, "more than 1,000,000 bytes"),
        (b"\xff\xfe1\x000\x00", "is not UTF-8 text"),
        (b"1e4\0 1e5", "has '1e4"),
    ],
)
def test_bad_files(content, message, tmp_path):
    (tmp_path / "bases").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=f"--harpe-bases.*{message}") as refused:
        HarpeConfig(bases=str(tmp_path / "bases")).resolve(2)
    assert len(str(refused.value)) < 600


def test_endless_file_is_not_read_to_its_end():
    """--harpe-bases /dev/zero filled the memory."""
    with pytest.raises(UsageError, match="--harpe-bases /dev/zero has more than 1,000,000 bytes"):
        HarpeConfig(bases="/dev/zero").resolve(2)


@pytest.mark.parametrize("name", ["missing", ".", "a\0b", "x" * 5000])
def test_no_file(name, tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        HarpeConfig(bases=f"{tmp_path}/{name}").resolve(2)


@pytest.mark.parametrize(
    "content", ["10000\n500000.0\n", "\ufeff[10000, 500000]", json.dumps({"bases": [1e4, "5e5"]}), "1e4 5e5"]
)
def test_files(content, tmp_path):
    (tmp_path / "bases").write_text(content, encoding="utf-8")
    assert HarpeConfig(bases=str(tmp_path / "bases")).resolve(2) == (1e4, 5e5)


def test_file_of_one_base(tmp_path):
    """One number in a file is a list of one base; it was refused as a JSON number."""
    (tmp_path / "bases").write_text("10000\n")
    assert HarpeConfig(bases=str(tmp_path / "bases")).resolve(1) == (1e4,)
