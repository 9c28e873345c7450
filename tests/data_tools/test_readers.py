"""Readers: every format gives the same text, what is no content is gone, and memory is bounded by the limit."""

import codecs
import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_ksa.data_tools.documents import BadDocument
from megatron_ksa.data_tools.preprocess import document_text
from megatron_ksa.data_tools.readers import input_files, read_documents
from megatron_ksa.errors import UsageError

ROOT = Path(__file__).parents[2]
BOM = codecs.BOM_UTF8
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(*files: Path, **options: object) -> list[str | tuple[str, str]]:
    """Text of each document, or where a bad one is and why."""
    found: list[str | tuple[str, str]] = []
    for document in read_documents(list(files), **{"text_column": "text", **options}):
        try:
            found.append(document_text(document, "text"))
        except BadDocument as error:
            found.append((document.origin, error.reason))
    return found


@pytest.mark.parametrize("packed", PACKED)
def test_byte_order_marks_are_no_content(packed, tmp_path):
    """U+FEFF was kept in text files, and made the first line of a JSONL file invalid."""
    text, lines = tmp_path / f"a.txt{packed}", tmp_path / f"a.jsonl{packed}"
    text.write_bytes(PACKED[packed](BOM + "one\ufeff".encode()))
    # Joined files have a mark in their middle. A mark that JSON escapes is content.
    record = b'{"text": "one"}\r\n'
    lines.write_bytes(PACKED[packed](BOM + record + BOM + record + b'\r\n{"text": "\\ufefftwo"}'))
    assert read(text, lines) == ["one\ufeff", "one", "one", "\ufefftwo"]


@pytest.mark.parametrize("packed", PACKED)
def test_compressed_files_of_a_folder_are_unpacked(packed, tmp_path):
    """A .gz or .zst among the text files of a folder was read as it lies there."""
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed]("Größe\r\nzwei\n".encode()))
    assert read(*input_files([str(tmp_path)], "*")) == ["Größe\r\nzwei\n"]


def test_suffixes_count_in_upper_case_too(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "loud"}\n'))
    assert read(*input_files([str(tmp_path / "A.JSONL.GZ")], "*")) == ["loud"]


@pytest.mark.parametrize("space", ["", "\n", "\r\n  "])
def test_json_file_may_be_one_array(space, tmp_path):
    """A .json file that is an array was refused without the cause, or read as one record where it was one a line."""
    records = [{"text": f'{i} [,] "{"x" * i * 3000}"', "other": {"text": "no"}} for i in range(40)]
    content = space + "[" + space + f",{space}".join(json.dumps(record) for record in records) + space + "]" + space
    (tmp_path / "a.json").write_bytes(BOM + content.encode())
    assert read(tmp_path / "a.json") == [record["text"] for record in records]
    (tmp_path / "empty.json").write_text(f"{space}[{space}]\n")
    assert read(tmp_path / "empty.json") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', "the JSON array cannot be read from element 2 on"),
        (b'[{"text": "a"} {"text": "b"}]', "element 1 .*'{' where a comma or ] belongs"),
        (b'[{"text": "a"}] x', "'x' after the array"),
        (b'[{"text": "a"},]', "element 2"),
        (b'[{"text": "\xff"}]', "element 1 .*utf-8"),
        (b"[" * 200_000, "element 1"),
        (b"[", "element 1"),
    ],
)
def test_array_that_ends_early_is_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.json")


def test_field_given_twice_is_no_guess(tmp_path):
    """Python's reader takes the last of two fields of one name: the text of the first was lost without a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c", "meta": {"x": 1, "x": 2}}\n')
    assert read(tmp_path / "a.jsonl") == [(f"{tmp_path}/a.jsonl:1", "a field twice"), "c"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_columns_of_text_and_bytes(kind, dictionary, tmp_path):
    """Bytes were tokenised as Python's repr; every way to hold text is read as the text."""
    texts = ["A café", "", "line\n\ufeff", "A café"]
    column = pa.array([text.encode() for text in texts] + [None]).cast(getattr(pa, kind)())
    if dictionary:
        if kind.endswith("view"):
            pytest.skip("Arrow has no dictionaries of views")
        column = column.dictionary_encode()
    parquet.write_table(pa.table({"id": range(5), "text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [*texts, (f"{tmp_path}/a.parquet:5", "no text")]
    rows = [json.loads(document.payload) for document in read_documents([tmp_path / "a.parquet"])]
    assert [row["text"] for row in rows] == [*texts, None]


def test_parquet_bytes_of_one_length(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([b"abc", b"d\xc3\xa9"], pa.binary(3))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["abc", "dé"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([["a", "b"]], "list<"), ([{"a": "b"}], "struct<a: string>"), ([7], "int64"), ([1.5], "double"), ([None], "null")],
)
def test_parquet_column_of_another_type_is_refused_by_name(values, kind, tmp_path):
    parquet.write_table(pa.table({"text": pa.array(values)}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"column 'text' .* is {kind}.*neither text nor bytes"):
        read(tmp_path / "a.parquet")


def test_parquet_columns_that_are_missing_or_there_twice(tmp_path):
    parquet.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no column 'text' .*its columns: 'body', 'id'"):
        read(tmp_path / "a.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    for column in ("text", None):
        with pytest.raises(UsageError, match="2 columns 'text'|more than one column is called 'text'"):
            read(tmp_path / "b.parquet", text_column=column)


def test_parquet_rows_keep_what_json_has_no_type_for(tmp_path):
    """Whole rows (TAGS): bytes anywhere are text, times and decimals print, and a bad cell costs its row alone."""
    table = pa.table({
        "text": pa.array(["good", "bad", "good"]),
        "raw": pa.array([{"b": [b"caf\xc3\xa9"]}, {"b": [b"\xff"]}, None]),
        "when": pa.array([0, 1, 2], pa.timestamp("s")),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = read_documents([tmp_path / "a.parquet"])
    assert json.loads(first.payload) == {"text": "good", "raw": {"b": ["café"]}, "when": "1970-01-01 00:00:00"}
    with pytest.raises(BadDocument, match="invalid UTF-8"):
        _ = second.payload
    assert json.loads(third.payload)["raw"] is None


LIMIT = 1000


def test_documents_above_the_limit_are_named_and_the_next_is_read(tmp_path):
    """A line of 50 MB took 8.8 GB, one of 1 GB in a .gz 2 GB: no more than the limit is held now."""
    fits, large = json.dumps({"text": "y" * (LIMIT - 20)}), json.dumps({"text": "x" * 5 * LIMIT})
    for packed, pack in PACKED.items():
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(pack(f"{fits}\n{large}\n{fits}\n".encode()))
        assert read(path, max_bytes=LIMIT)[1] == (f"{path}:2", "too large") and len(read(path, max_bytes=LIMIT)) == 3
        text = tmp_path / f"a.txt{packed}"
        for size, found in ((LIMIT, "z" * LIMIT), (LIMIT + 1, (str(text), "too large"))):
            text.write_bytes(pack(b"z" * size))
            assert read(text, max_bytes=LIMIT) == [found]
    (tmp_path / "a.json").write_text(f"[{fits}, {large}, {fits}]")
    found = read(tmp_path / "a.json", max_bytes=3 * LIMIT)
    assert found[1] == (f"{tmp_path}/a.json:2", "too large") and found[0] == found[2]
    column = pa.array(["a" * 3 * LIMIT, "b"] + ["c"] * 9)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="none")
    for text_column in ("text", None):
        found = read(tmp_path / "a.parquet", max_bytes=LIMIT, text_column=text_column)
        assert found == [(f"{tmp_path}/a.parquet:1", "too large"), "b", *"ccccccccc"]


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_in_a_few_megabytes(tmp_path):
    """The same at full size, in a process that may use 400 MB more than its libraries: named, in a line."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "good"}\n{"text": "')
        for _ in range(1000):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n{"text": "good too"}\n')
    code = (
        "import resource, sys; from pathlib import Path; from megatron_ksa.data_tools.readers import read_documents\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))\n"
        "found = read_documents([Path(sys.argv[1])], max_bytes=10_000_000)\n"
        "print([document.problem[0] if document.problem else document.content for document in found])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == '[b\'{"text": "good"}\\n\', \'too large\', b\'{"text": "good too"}\\n\']', done.stderr


def test_row_group_that_cannot_be_within_the_limit_is_refused_unread(tmp_path):
    """One cell of a Parquet file is decompressed whole by the library, so its size is looked up before."""
    parquet.write_table(pa.table({"text": ["x" * 3_000_000]}), tmp_path / "a.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        UsageError, match="rows of row group 1 have 3,0.* bytes in column 'text' on average, more than 1,000"
    ):
        read(tmp_path / "a.parquet", max_bytes=1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_file_that_cannot_be_read_is_named(name, tmp_path):
    """A file that is gone, or a folder in its place, ended in a traceback."""
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=str(tmp_path / name)):
        read(tmp_path / name)


def test_device_is_no_input():
    with pytest.raises(UsageError, match="/dev/zero: neither a regular file nor a folder"):
        input_files(["/dev/zero"], "*")


def test_subfolder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """pathlib leaves out folders without permission: their files were missing from the data without a word."""
    (tmp_path / "a.txt").write_text("a")

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "locked")))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UsageError, match="locked cannot be read: Permission denied"):
        input_files([str(tmp_path)], "**/*.txt")


@pytest.mark.parametrize("pattern", ["", "/etc/*"])
def test_pattern_that_no_folder_takes_is_one_line(pattern, tmp_path):
    with pytest.raises(UsageError, match="--glob"):
        input_files([str(tmp_path)], pattern)


def test_utf16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    (document,) = read_documents([tmp_path / "a.txt"])
    with pytest.raises(BadDocument, match="starts like UTF-16"):
        document_text(document, "text")


def test_damaged_archives_are_named(tmp_path):
    """The Zstandard library's reader takes a truncated file for a whole one: the rest was lost without a word."""
    content = b'{"text": "x"}\n' * 1000
    for suffix in (".gz", ".zst"):
        whole = PACKED[suffix](content)
        for damaged in (whole[: len(whole) // 2], whole[:10] + b"\0\0\0\0" + whole[14:]):
            path = tmp_path / f"a.jsonl{suffix}"
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match="truncated or damaged"):
                read(path)
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": ["x"] * 100}), sink)
    (tmp_path / "a.parquet").write_bytes(sink.getvalue()[:-20])
    with pytest.raises(UsageError, match="not a Parquet file"):
        read(tmp_path / "a.parquet")
