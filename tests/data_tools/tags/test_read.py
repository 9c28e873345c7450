"""Reading: every format and schema becomes a record, every line that cannot is listed, and nothing is lost."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.formats import input_files
from megatron_ksa.data_tools.tags.read import RECORDS, REJECTED, read
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.errors import UsageError


def reading(folder: Path, *inputs: Path, **settings) -> tuple[dict, list[dict], list[dict]]:
    """Counts, records and rejected rows."""
    counts = read(input_files([str(path) for path in inputs], "**/*.txt"), folder, RecordSettings(**settings), Engine())
    return counts, list(read_jsonl(folder / RECORDS)), list(read_jsonl(folder / REJECTED))


def jsonl(path: Path, *rows: dict | bytes) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.mark.parametrize(
    ("row", "settings", "body"),
    [
        ({"instruction": "Why?", "output": "Because."}, {}, {"messages": ASKED}),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief"}, {},
            {"messages": [
                {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Add\n\n1 2"},
                {"role": "assistant", "content": "3"},
            ]},
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, {},
            {"messages": ASKED},
        ),
        ({"messages": ASKED}, {}, {"messages": ASKED}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ASKED[1]]}, {},
            {"messages": ASKED},
        ),
        ({"text": "Once."}, {}, {"text": "Once."}),
        ({"body": "Once.", "text": "no"}, {"text_field": "body"}, {"text": "Once."}),
        ({"q": "Why?", "a": "Because."}, {"prompt_field": "q", "response_field": "a"}, {"messages": ASKED}),
        ({"turns": ASKED, "messages": []}, {"messages_field": "turns"}, {"messages": ASKED}),
    ],
)  # fmt: skip
def test_schemas(tmp_path, row, settings, body):
    _, (record,), rejected = reading(tmp_path, jsonl(tmp_path / "in.jsonl", row), **settings)
    assert {key: record[key] for key in ("text", "messages") if key in record} == body and not rejected
    assert record["source"] == "in" and record["id"].startswith("in/")


def _zst(path: Path, data: bytes) -> None:
    path.write_bytes(pytest.importorskip("zstandard", reason=".zst needs zstandard").ZstdCompressor().compress(data))


def _parquet(path: Path, data: bytes) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in data.splitlines()]), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("in.jsonl", Path.write_bytes),
        ("in.jsonl.gz", lambda path, data: path.write_bytes(gzip.compress(data))),
        ("in.jsonl.zst", _zst),
        ("in.parquet", _parquet),
    ],
)
def test_formats_give_the_same_records(tmp_path, name, write):
    rows = [{"id": f"n{n}", "messages": ASKED, "quality": n, "tags": ["a", "b"], "source": "s"} for n in range(1, 4)]
    write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    counts, records, _ = reading(tmp_path, tmp_path / name)
    expected = [
        {"id": f"s/n{n}", "source": "s", "messages": ASKED, "quality": float(n), "difficulty": None, "tags": ["a", "b"]}
        for n in range(1, 4)
    ]
    assert records == expected and counts["sources"] == {"s": 3}


@pytest.mark.parametrize(("name", "package"), [("in.jsonl.zst", "zstandard"), ("in.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tmp_path, name, package, monkeypatch):
    (tmp_path / name).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        reading(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet"])
def test_damaged_files_are_refused_and_nothing_is_left(tmp_path, name):
    if not name.endswith("gz"):
        pytest.importorskip({"zst": "zstandard", "parquet": "pyarrow"}[name.rpartition(".")[2]])
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    (tmp_path / name).write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="--input .*(damaged|not a Parquet)"):
        reading(tmp_path, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_text_files_of_a_folder_are_records(tmp_path):
    for name, text in (("b/two.txt", "two"), ("a/one.txt", "one"), ("a/skip.md", "no")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    _, records, _ = reading(tmp_path, tmp_path / "in")
    assert [(record["source"], record["text"]) for record in records] == [("a", "one"), ("b", "two")]


def test_every_line_is_a_record_or_listed_with_its_place(tmp_path):
    bad = {
        b'{"text": "half': "invalid JSON",
        b"[1]": "not an object",
        b"3": "not an object",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": "\\ud800"}': "invalid UTF-8",
        b'{"text": " \\n "}': "empty",
        b'{"messages": []}': "empty",
        b'{"messages": [{"role": "wizard", "content": "x"}]}': "no recognised fields",
        b'{"messages": "hello"}': "no recognised fields",
        b'{"title": "x"}': "no recognised fields",
        b"{}": "no recognised fields",
        b'{"text": 7}': "no recognised fields",
        b"[" * 100_000: "invalid JSON",
        json.dumps({"text": "x" * 10_000_001}).encode(): "too large",
        b'{"id": 1, "text": "again"}': "duplicate id",
    }
    path = jsonl(
        tmp_path / "in.jsonl", {"id": 1, "text": "first"}, *bad, {"text": "same words"}, {"text": "same words"}
    )
    counts, records, rejected = reading(tmp_path, path)
    assert [record["text"] for record in records] == ["first", "same words"]
    assert [row["reason"] for row in rejected] == [*bad.values(), "duplicate id"]
    assert [row["origin"] for row in rejected] == [f"{path}:{line}" for line in (*range(2, len(bad) + 2), len(bad) + 3)]
    assert counts["records"] + counts["rejected"] == len(bad) + 3 and rejected[-2]["id"] == "in/1"


def test_scores_and_tags_of_no_use_are_counted(tmp_path):
    """Scores from 0 to 1 or to 100, or as text, were lost without a word, and the rule's stood in their place."""
    rows = [
        {"text": "a", "quality": 0.8, "difficulty": 70}, {"text": "b", "quality": "7", "tags": {"chess": 1}},
        {"text": "c", "quality": 7, "difficulty": None, "tags": ["chess", 3]}, {"text": "d", "tags": []},
    ]  # fmt: skip
    counts, records, _ = reading(tmp_path, jsonl(tmp_path / "in.jsonl", *rows))
    assert counts["fields_not_carried"] == {"quality": 2, "difficulty": 1, "tags": 2}
    assert [record["quality"] for record in records] == [None, None, 7.0, None] and records[2]["tags"] == ["chess"]


def test_every_rejected_row_has_an_id_that_leads_to_it(tmp_path):
    """The id was null in every row but those of a second id."""
    rows = {
        b'{"id": 7, "messages": "hello"}': "in/7",
        b'{"id": "a", "source": "s", "text": " "}': "s/a",
        b'{"id": "\\ud800", "text": " "}': None,
        b'{"id": true, "title": "x"}': None,
        b'{"id": 8, "id": 9, "text": "x"}': None,
        json.dumps({"id": 10, "text": "x" * 2000}).encode(): None,
        b'{"id": 11': None,
    }
    path = jsonl(tmp_path / "in.jsonl", *rows, {"text": "kept"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty.txt").write_text(" ")
    _, records, rejected = reading(tmp_path, path, tmp_path / "texts", max_bytes=1000)
    expected = [name or f"{path}:{line}" for line, name in enumerate(rows.values(), 1)]
    assert [row["id"] for row in rejected] == [*expected, str(tmp_path / "texts" / "empty.txt")] and len(records) == 1


def test_fields_that_records_do_not_hold_are_counted(tmp_path):
    """`documents` and `choices` beside a question were left out, and nothing said so."""
    asked = {"question": "Which?", "answer": "B", "quality": 3, "id": "1"}
    pool = jsonl(
        tmp_path / "pool.jsonl", {**asked, "choices": ["A", "B"], "documents": "Two", "note": None, "input": "Of two"},
        {"messages": ASKED, "text": "Another", "choices": [], "id": "2"}, {"choices": ["A"]},
    )  # fmt: skip
    counts, records, _ = reading(tmp_path, pool)
    assert len(records) == 2
    assert counts["fields_not_carried"] == {"choices": 1, "documents": 1, "text": 1}


def test_scores_and_tags_that_make_no_sense_do_not_count(tmp_path):
    path = jsonl(
        tmp_path / "in.jsonl",
        {"text": "a", "quality": 11, "difficulty": True, "tags": "x, y"},
        {"text": "b", "quality": "7"},
    )
    _, (first, second), _ = reading(tmp_path, path)
    assert (first["quality"], first["difficulty"], first["tags"]) == (None, None, ["x", " y"])
    assert (second["quality"], second["tags"]) == (None, None)


def test_nothing_to_use_is_refused_and_nothing_is_left(tmp_path):
    path = jsonl(tmp_path / "in.jsonl", b"{", b"{", {"text": ""})
    # It was not told which line and which fields, and rejected.jsonl is not there.
    with pytest.raises(UsageError, match=r"can be used \(2 invalid JSON, the first .*:1: .*; 1 empty, the first "):
        reading(tmp_path, path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_field": "q"}, "--prompt-field and --response-field go together"),
        ({"text_field": "t", "messages_field": "m"}, "name one of"),
        ({"max_bytes": 0}, "--max-record-bytes 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        RecordSettings(**settings)
