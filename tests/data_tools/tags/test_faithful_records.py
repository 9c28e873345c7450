"""Nothing of a raw document is lost: what has a place in a record is there, what has none refuses it with a reason."""

import json
import struct
from pathlib import Path

import pytest

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.formats import input_files, source_name
from megatron_ksa.data_tools.tags.read import RECORDS, REJECTED, read
from megatron_ksa.data_tools.tags.records import RecordSettings, record_text
from megatron_ksa.errors import UsageError

CASES = Path(__file__).with_name("cases")
WHY, BECAUSE = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TIDES = {"type": "function", "function": {"name": "tides", "parameters": {"type": "object"}}}


def reading(folder: Path, *inputs: Path, pattern: str | None = None, **settings):
    """Counts, records and rejected rows."""
    files = input_files([str(path) for path in inputs], pattern)
    counts = read(files, folder / "work", RecordSettings(**settings), Engine())
    return counts, list(read_jsonl(folder / "work" / RECORDS)), list(read_jsonl(folder / "work" / REJECTED))


def one(folder: Path, row: dict, **settings) -> dict:
    """The record of a row, which must be the only one."""
    (folder / "in.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    _, records, rejected = reading(folder, folder / "in.jsonl", **settings)
    assert len(records) == 1 and not rejected
    return records[0]


def refusal(folder: Path, row: dict, **settings) -> tuple[str, str]:
    """Reason and detail of a row that must be refused."""
    lines = (json.dumps(row), json.dumps({"text": "another"}))
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    counts, records, rejected = reading(folder, folder / "in.jsonl", **settings)
    assert len(records) == 1 and len(rejected) == 1 and counts["reasons"] == {rejected[0]["reason"]: 1}
    return rejected[0]["reason"], rejected[0]["detail"]


def test_tool_calls_results_and_tools_are_carried(tmp_path):
    """Calls and tools once vanished with "0 rejected", and a record that ended in a call kept its question alone."""
    counts, records, _ = reading(tmp_path, CASES / "tool_calls.jsonl")
    assert counts["records"] == 4 and counts["rejected"] == 0
    raw = [json.loads(line) for line in (CASES / "tool_calls.jsonl").read_text().splitlines()]
    for record, given in zip(records, raw, strict=True):
        assert record["tools"] == given["tools"]
        for message, told in zip(record["messages"], given["messages"], strict=True):
            assert message == {**told, "content": told["content"] or ""}
    assert "tide_table" in record_text(records[0]) and "Brest" in record_text(records[0])
    assert records[3]["messages"][-1]["tool_calls"][0]["function"]["name"] == "ferry_times"


def test_system_and_tools_beside_a_conversation(tmp_path):
    """`system` and `tools` beside ShareGPT's list once vanished."""
    _, (record,), _ = reading(tmp_path, CASES / "sharegpt_system_beside.jsonl")
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][0]["content"] == "You answer like a sailor."
    assert record["tools"] == [{"type": "function", "function": {"name": "dig"}}]


def test_history_comes_first(tmp_path):
    """Alpaca's `history` once vanished."""
    _, (record,), _ = reading(tmp_path, CASES / "alpaca_history.jsonl")
    assert [message["content"] for message in record["messages"]] == [
        "How is summer?", "Hot.", "And autumn?", "Wet.", "And in winter?", "Cold.",
    ]  # fmt: skip


def test_null_fields_are_absent(tmp_path):
    """Tables that were joined give every row the columns of all; a null once hid the row's own fields."""
    counts, records, _ = reading(tmp_path, CASES / "null_columns.jsonl")
    assert counts["rejected"] == 0
    assert [record["messages"][-1]["content"] for record in records] == ["Teal.", "Zinc."]


@pytest.mark.parametrize(("name", "records"), [("array.json", 5), ("array_one_a_line.json", 5), ("bom.jsonl", 3)])
def test_arrays_marks_and_line_ends(tmp_path, name, records):
    """An array was refused, or gave one record of five; a byte order mark cost the first record."""
    counts, found, _ = reading(tmp_path, CASES / name)
    sources = {name.partition(".")[0]: records}
    assert counts == {"records": records, "rejected": 0, "reasons": {}, "sources": sources, "fields_not_carried": {}}
    assert found[0]["messages"][1]["content"] == "BIRD"


def test_one_id_in_two_shards_is_two_records(tmp_path):
    """The second record of an id, another one in another file, was once rejected; a copy of the record still is."""
    shards = CASES / "same_id_in_two_shards"
    counts, records, _ = reading(tmp_path, shards)
    assert counts["records"] == 2 and counts["sources"] == {"flan": 2}
    assert [record["messages"][1]["content"] for record in records] == ["Como.", "Down."]
    assert records[0]["id"] == "flan/1" and records[1]["id"].startswith("flan/1#")
    (tmp_path / "c.jsonl").write_bytes((shards / "b.jsonl").read_bytes())
    (tmp_path / "d.jsonl").write_text("".join(f'{{"source": "flan", "id": 1, "text": "{text}"}}\n' for text in "xy"))
    files = [shards / "a.jsonl", shards / "b.jsonl", tmp_path / "c.jsonl", tmp_path / "d.jsonl"]
    counts, again, rejected = reading(tmp_path, *files)
    assert again[:2] == records and [record["text"] for record in again[2:]] == ["x"]
    assert [row["id"] for row in rejected] == ["flan/1", "flan/1"] and counts["reasons"] == {"duplicate id": 2}
    assert len({record["id"] for record in again}) == 3


CALL = {"name": "tides", "arguments": {"port": "Brest"}}
CALLING = {"role": "tool_call", "content": json.dumps(CALL)}
CALLED = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        # The older function_call, with functions beside it.
        (
            {
                "messages": [WHY, {"role": "assistant", "content": None, "function_call": CALL}],
                "functions": [TIDES["function"]],
            },
            [WHY, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}],
        ),
        (
            {"conversations": [
                {"from": "human", "value": "Why?"}, {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "high"}, {"from": "gpt", "value": "Because."},
            ], "tools": json.dumps([TIDES])},
            [
                WHY, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "high"}, BECAUSE,
            ],
        ),
        # ms-swift: calls side by side, and a call after what the assistant said, are one turn of the assistant.
        (
            {"messages": [
                WHY, CALLING, CALLING, {"role": "tool_response", "content": "[1]"}, {"role": "tool", "content": "[2]"},
                BECAUSE, {"role": "tool_call", "content": json.dumps([CALL, CALL])},
            ], "tools": json.dumps([TIDES])},
            [
                WHY, {"role": "assistant", "content": "", "tool_calls": [CALLED, CALLED]},
                {"role": "tool", "content": "[1]"}, {"role": "tool", "content": "[2]"},
                {**BECAUSE, "tool_calls": [CALLED, CALLED]},
            ],
        ),
        # A call that counts in the loss is no part of a turn that does not.
        (
            {"messages": [
                WHY, {**BECAUSE, "loss": False}, {**CALLING, "content": CALL}, *([{**CALLING, "loss": False}] * 2),
            ], "tools": [TIDES]},
            [
                WHY, {**BECAUSE, "weight": 0}, {"role": "assistant", "content": "", "tool_calls": [CALLED]},
                {"role": "assistant", "content": "", "tool_calls": [CALLED, CALLED], "weight": 0},
            ],
        ),
    ],
)  # fmt: skip
def test_older_and_other_forms_of_tool_calls(tmp_path, row, messages):
    """ms-swift's roles tool_call and tool_response were refused: records with tools of its format were lost."""
    record = one(tmp_path, row)
    assert record["messages"] == messages and record["tools"] == [TIDES]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [WHY, {**BECAUSE, "weight": 0}]}, [WHY, {**BECAUSE, "weight": 0}]),
        ({"messages": [WHY, {**BECAUSE, "weight": 1}]}, [WHY, BECAUSE]),
        ({"messages": [WHY, {**BECAUSE, "train": False}]}, [WHY, {**BECAUSE, "weight": 0}]),
        (
            {"messages": [WHY, {**BECAUSE, "reasoning_content": "Hm."}]},
            [WHY, {**BECAUSE, "reasoning_content": "Hm."}],
        ),
        ({"messages": [WHY, {**BECAUSE, "reasoning": "Hm."}]}, [WHY, {**BECAUSE, "reasoning_content": "Hm."}]),
        (
            {"messages": [WHY, {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Be"},
                {"type": "text", "text": "cause."},
            ]}]},
            [WHY, {"role": "assistant", "content": "Be\ncause.", "reasoning_content": "Hm."}],
        ),
        # Thoughts under the second name beside a first one that is null or empty were once lost.
        *(
            (
                {"messages": [WHY, {**BECAUSE, "reasoning_content": nothing, "reasoning": "Hm."}]},
                [WHY, {**BECAUSE, "reasoning_content": "Hm."}],
            )
            for nothing in (None, "")
        ),
        # An answer that stands under `refusal`, with a content that is null, was once lost with its turn.
        (
            {"messages": [WHY, {"role": "assistant", "content": None, "refusal": "I can't say."}]},
            [WHY, {"role": "assistant", "content": "I can't say."}],
        ),
        ({"messages": [WHY, {**BECAUSE, "refusal": None}]}, [WHY, BECAUSE]),
        # A field that no schema names stays for templates that look at it.
        ({"messages": [{**WHY, "name": "Ann"}, BECAUSE]}, [{**WHY, "name": "Ann"}, BECAUSE]),
        ({"messages": [WHY, BECAUSE, {"role": "assistant", "content": " "}]}, [WHY, BECAUSE]),
        ({"question": "Why?", "answer": "Because."}, [WHY, BECAUSE]),
        ({"prompt": "Why?", "completion": "Because."}, [WHY, BECAUSE]),
        ({"prompt": [WHY], "completion": [BECAUSE]}, [WHY, BECAUSE]),
        ({"prompt": "Why?", "completion": "Because.", "label": True}, [WHY, BECAUSE]),
        (
            {"instruction": "Why?", "context": "It rains.", "response": "Because."},
            [{"role": "user", "content": "Why?\n\nIt rains."}, BECAUSE],
        ),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [WHY, BECAUSE]),
        ({"prompt": [WHY], "chosen": [BECAUSE], "rejected": [WHY]}, [WHY, BECAUSE]),
        ({"chosen": [WHY, BECAUSE], "rejected": [WHY, WHY]}, [WHY, BECAUSE]),
        (
            {"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", "value": "Because."},
             "rejected": {"from": "gpt", "value": "No."}},
            [WHY, BECAUSE],
        ),
        (
            {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
            [{"role": "system", "content": "Be brief."}, WHY, BECAUSE],
        ),
        # A question that is itself JSON is a text.
        ({"question": "[1, 2]", "answer": "Because."}, [{"role": "user", "content": "[1, 2]"}, BECAUSE]),
        ({"messages": json.dumps([WHY, BECAUSE])}, [WHY, BECAUSE]),
        # ms-swift's older conversations.
        ({"conversation": [{"human": "Why?", "assistant": "Because."}] * 2}, [WHY, BECAUSE] * 2),
        ({"messages": [WHY, BECAUSE], "label": True}, [WHY, BECAUSE]),
        (
            {"messages": [WHY, BECAUSE], "system": [{"type": "text", "text": "Be brief."}]},
            [{"role": "system", "content": "Be brief."}, WHY, BECAUSE],
        ),
    ],
)  # fmt: skip
def test_schemas(tmp_path, row, messages):
    assert one(tmp_path, row)["messages"] == messages


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (
            {"prompt_field": "data.question", "response_field": "data.answers.0.text"},
            {"data": {"question": "Why?", "answers": [{"text": "Because."}, {"text": "No."}]}},
        ),
        ({"messages_field": "chat.turns"}, {"chat": {"turns": [WHY, BECAUSE]}}),
        ({"prompt_field": "a.b", "response_field": "c"}, {"a.b": "Why?", "c": "Because."}),
    ],
)
def test_fields_by_a_path_with_dots(tmp_path, settings, row):
    row |= {"meta": {"id": 7, "from": "s", "score": 4}, "prefix": "Be brief."}
    names = {
        "id_field": "meta.id",
        "source_field": "meta.from",
        "quality_field": "meta.score",
        "system_field": "prefix",
    }
    record = one(tmp_path, row, **settings, **names)
    assert record["messages"] == [{"role": "system", "content": "Be brief."}, WHY, BECAUSE]
    assert (record["id"], record["source"], record["quality"]) == ("s/7", "s", 4.0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, BECAUSE]},
            "images or other media",
        ),
        ({"messages": [WHY, BECAUSE], "images": ["a.png"]}, "images or other media"),
        ({"conversations": [WHY, BECAUSE], "image": {"bytes": "", "path": "a.png"}}, "images or other media"),
        # Sound or pictures beside a message's content: the turn was once lost, or kept without them.
        ({"messages": [WHY, {"role": "assistant", "content": None, "audio": {"id": "a"}}]}, "images or other media"),
        ({"messages": [{**WHY, "images": ["a.png"]}, BECAUSE]}, "images or other media"),
        ({"messages": [WHY, {**BECAUSE, "reasoning": ["Hm."]}]}, "no recognised fields"),
        (
            {"messages": [WHY, {**BECAUSE, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "tool call without a name",
        ),
        (
            {"conversations": [WHY, {"from": "function_call", "value": "call the harbour"}]},
            "tool call without a name",
        ),
        ({"messages": [WHY, {"role": "tool_call", "content": "call the harbour"}]}, "tool call without a name"),
        ({"messages": [WHY, {"role": "tool_call", "content": '{"arguments": {}}'}]}, "tool call without a name"),
        ({"messages": [WHY, {"role": "tool_response", "content": {"high": 3}}]}, "no recognised fields"),
        # An answer to be unlearned was once an instance like others.
        ({"messages": [WHY, BECAUSE], "label": False}, "marked as not preferred"),
        ({"conversations": [WHY, BECAUSE], "kto_tag": False}, "marked as not preferred"),
        # A system prompt that is no text was lost.
        ({"messages": [WHY, BECAUSE], "system": {"text": "Be brief."}}, "no recognised fields"),
        ({"conversation": [{"human": "Why?", "assistant": 7}]}, "no recognised fields"),
        ({"messages": [WHY, BECAUSE], "tools": "a hammer"}, "tools that are no list"),
        ({"messages": [WHY, {**BECAUSE, "weight": 0.5}]}, "weight of a message other than 0 and 1"),
        ({"instruction": "Why?", "output": "Because.", "history": [["only one"]]}, "history that is no list of pairs"),
        ({"prompt": "Why?", "completion": "No.", "label": False}, "marked as not preferred"),
        ({"messages": [WHY, {**BECAUSE, "tool_calls": [{"name": "f", "arguments": float("nan")}]}]}, "invalid JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_is_counted_with_its_reason(tmp_path, row, reason):
    assert refusal(tmp_path, row)[0] == reason


def saved(folder: Path, rows: list[dict]) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` writes it, in two files."""
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    table = pyarrow.Table.from_pylist(rows)
    for number, name in enumerate(names):
        part = table.slice(number * (len(rows) // 2), len(rows) // 2 + number * (len(rows) % 2))
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def rows_of_a_table() -> list[dict]:
    """Tools of different fields: Arrow gives each the fields of all, with nulls."""
    tides = {"name": "tides", "parameters": {"port": {"type": "string"}}}
    ferry = {"name": "ferry", "parameters": {"line": {"type": "integer"}}}
    return [
        {"id": number, "messages": [WHY, {**BECAUSE, "weight": None}], "tools": [tool]}
        for number, tool in enumerate((tides, ferry, tides))
    ]


def test_folders_of_datasets(tmp_path):
    rows = rows_of_a_table()
    saved(tmp_path / "harbour" / "train", rows)
    (tmp_path / "harbour" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for folder in (tmp_path / "harbour", tmp_path / "harbour" / "train"):
        counts, records, _ = reading(tmp_path, folder)
        assert counts["sources"] == {"harbour": 3}
        assert [record["id"] for record in records] == ["harbour/0", "harbour/1", "harbour/2"]
        assert [record["tools"][0]["function"] for record in records] == [row["tools"][0] for row in rows]
        assert records[0]["messages"] == [WHY, BECAUSE]
    (tmp_path / "harbour" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match="holds the splits train, test; name one"):
        input_files([str(tmp_path / "harbour")])
    (tmp_path / "harbour" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UsageError, match="data-00001-of-00002.arrow of state.json is missing"):
        input_files([str(tmp_path / "harbour" / "train")])


def test_parquet_shards_of_a_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    rows = rows_of_a_table()
    data = tmp_path / "harbour" / "data"
    data.mkdir(parents=True)
    (tmp_path / "harbour" / "README.md").write_text("no data")
    for number in range(3):
        parquet.write_table(
            pyarrow.Table.from_pylist(rows).slice(number, 1), data / f"train-{number:05d}-of-00003.parquet"
        )
    counts, records, _ = reading(tmp_path, tmp_path / "harbour")
    assert counts["sources"] == {"harbour": 3}
    assert [record["tools"][0]["function"] for record in records] == [row["tools"][0] for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), data / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="holds the splits test, train; choose with --glob"):
        input_files([str(tmp_path / "harbour")])
    assert len(input_files([str(tmp_path / "harbour")], "**/train-*")) == 3


def test_a_damaged_arrow_file_and_bad_text_in_one(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
    (tmp_path / "cut.arrow").write_bytes(struct.pack("<I", 0xFFFFFFFF) + b"\x10\x00")
    with pytest.raises(UsageError, match="not an Arrow file"):
        reading(tmp_path, tmp_path / "cut.arrow")
    texts = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(tmp_path / "bad.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    counts, records, rejected = reading(tmp_path, tmp_path / "bad.arrow")
    assert [record["text"] for record in records] == ["good"] and counts["reasons"] == {"invalid UTF-8": 1}
    assert rejected[0]["origin"] == f"{tmp_path / 'bad.arrow'}:2"


def test_a_folder_with_both_kinds_asks(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UsageError, match="choose with --glob"):
        input_files([str(tmp_path)])
    assert input_files([str(tmp_path)], "*.txt") == [tmp_path / "a.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no \.txt and no \.jsonl"):
        input_files([str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pool/a.jsonl.gz", "a"), ("flan/data/train-00000-of-00002.parquet", "flan"),
        ("flan/train/data-00000-of-00002.arrow", "flan"), ("part-00001-of-00009.jsonl", "part"),
        ("books/one.txt", "books"), (".jsonl", ".jsonl"),
    ],
)  # fmt: skip
def test_source_of_a_file(path, name):
    assert source_name(Path(path)) == name
