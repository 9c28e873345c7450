"""The export: the chosen records whole, with what the selection knows of them, and readable as input again."""

import json

import pytest
from raw_pool import topic_records

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.export import ExportSettings
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.formats import input_files
from megatron_ksa.data_tools.tags.read import RECORDS, read
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.errors import UsageError

CALL = {"type": "function", "function": {"name": "tides", "arguments": {"port": "Brest", "days": [1, 2]}}}
TOOL = {"type": "function", "function": {"name": "tides", "parameters": {"type": "object", "default": None}}}


@pytest.fixture
def work(tmp_path, call):
    """A work folder after `sample`, with a record of every kind in the pool."""
    records = topic_records(40)
    records[0] = records[0] | {
        "messages": [
            {"role": "user", "content": "When is high tide? " + records[0]["output"], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "00:40"},
            {"role": "assistant", "content": "At 00:40.", "reasoning_content": "Hm.", "weight": 0},
        ],
        "tools": [TOOL],
    }  # fmt: skip
    records[4] = {"id": 4, "text": records[4]["output"], "source": "set 1"}
    for record in records:
        record["tags"] = (record.get("output") or record["text"]).split()[:3]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    flags = ("--work", tmp_path / "work", "--input", tmp_path / "pool.jsonl", "--tagger", "data")
    assert call("tag", *flags)[0] == 0
    assert call("tree", "--work", tmp_path / "work", "--top-branches", 3)[0] == 0
    (tmp_path / "always.txt").write_text("set 0/0\nset 1/4\n", encoding="utf-8")
    flags = ("--budget", "50%,90%", "--always", tmp_path / "always.txt")
    assert call("sample", "--work", tmp_path / "work", *flags)[0] == 0
    return tmp_path / "work"


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_chosen_records_are_there_and_can_be_read_again(work, tmp_path, call, format):
    code, out, error = call("export", "--work", work, "--export", format, "--weights", "equal", "--group-by", "source")
    assert code == 0 and "records" in out, error
    path = work / "export" / f"selection.{format}"
    if format == "jsonl":
        rows = list(read_jsonl(path))
    else:
        pyarrow = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
        rows = pyarrow.read_table(path).to_pylist()
    selection = {row["id"]: row for row in read_jsonl(work / "selection.jsonl")}
    assert [row["id"] for row in rows] == [name for name in _ids(work) if name in selection]
    for row in rows:
        chosen = selection[row["id"]]
        assert (row["gain"], row["budget"]) == (pytest.approx(chosen["gain"]), chosen["budget"])
        assert row["tags"] and row["branch"]
    assert sorted(row["rank"] for row in rows) == list(range(len(rows)))
    totals = {source: sum(row["weight"] for row in rows if row["source"] == source) for source in ("set 0", "set 1")}
    assert totals["set 0"] == pytest.approx(totals["set 1"])
    assert sum(row["weight"] for row in rows) == pytest.approx(len(rows))
    read(input_files([str(path)]), tmp_path / "again", RecordSettings(), Engine())
    again = {row["id"].removeprefix(row["source"] + "/"): row for row in read_jsonl(tmp_path / "again" / RECORDS)}
    for record in read_jsonl(work / RECORDS):
        if record["id"] in selection:
            kept = {name: record[name] for name in ("text", "messages", "tools") if name in record}
            assert {name: again[record["id"]][name] for name in kept} == kept


def _ids(work) -> list[str]:
    return [record["id"] for record in read_jsonl(work / RECORDS)]


def test_it_stands_and_one_budget_of_several(work, call):
    assert "stands" not in call("export", "--work", work, "--export", "jsonl")[1]
    assert "export: stands" in call("export", "--work", work, "--export", "jsonl")[1]
    whole = len(list(read_jsonl(work / "export" / "selection.jsonl")))
    assert call("export", "--work", work, "--export", "jsonl", "--of-budget", 1)[0] == 0
    assert 0 < len(list(read_jsonl(work / "export" / "selection.jsonl"))) < whole
    assert call("export", "--work", work)[2] == "error: --export none: name a format, jsonl or parquet"
    assert call("export", "--work", work, "--export", "jsonl", "--of-budget", 3)[2].startswith("error: --of-budget 3")


def test_a_package_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        ExportSettings("parquet")
    with pytest.raises(UsageError, match="--export csv"):
        ExportSettings("csv")
