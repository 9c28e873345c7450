"""Small files are read in bounds, and what they are not is said in one line."""

from pathlib import Path

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json, read_small


def test_endless_files_do_not_fill_the_memory():
    """/dev/zero as a list of bases, a file of flags or a config.json was read until the process was killed."""
    with pytest.raises(UsageError, match="--model /dev/zero has more than 1,000,000 bytes"):
        read_small(Path("/dev/zero"), "--model")
    with pytest.raises(UsageError, match="^/dev/zero has more than 100,000,000 bytes"):
        read_json(Path("/dev/zero"))


def test_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf--ksa\r\n")
    assert read_small(tmp_path / "a", "--model") == "--ksa\r\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[" * 100_000, "cannot be read as JSON"), (b"\xff", "is not UTF-8"), (b"[]", "no JSON object")],
)
def test_configurations_that_are_none(content, message, tmp_path):
    """A config.json of 100,000 brackets ended in a RecursionError."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_json(tmp_path / "config.json")
