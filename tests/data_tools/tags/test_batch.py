"""The batch form: requests as a file, results in any order and from several runs, nothing taken or paid twice."""

import gzip
import json
from pathlib import Path

import pytest
from chat_server import GOOD
from raw_pool import topic_records
from test_endpoint_tagger import write_records

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.tag import tag
from megatron_ksa.data_tools.tags.taggers import batch
from megatron_ksa.data_tools.tags.taggers.batch import BatchTagger, write_requests
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError

SETTINGS = EndpointSettings(model="m", input_price=1e6)


def result(key: str, content: str, finish: str = "stop", **other: object) -> dict:
    """A line as OpenAI's Batch API and vLLM's run-batch write it."""
    message = {"role": "assistant", "content": content}
    body = {"choices": [{"message": message, "finish_reason": finish}], "usage": {"prompt_tokens": 10}}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": f"batch_{key[:8]}", "custom_id": key, "response": response, "error": None, **other}


def write_results(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def requests(folder: Path, name: str = "requests.jsonl") -> dict[str, dict]:
    """The requests written, by the text asked about."""
    counts = write_requests(folder / "records.jsonl", folder / name, SETTINGS, folder / "cache.sqlite")
    found = {}
    for path in [folder / name, *sorted(folder.glob(f"{Path(name).stem}-*.jsonl"))][: counts["files"]]:
        for row in read_jsonl(path):
            found[json.loads(row["body"]["messages"][1]["content"])] = row
    assert len(found) == counts["requests"]
    return found


def test_requests_results_and_what_is_left(tmp_path):
    texts = ["a", "b", "c", "d", "e", "a"]
    write_records(tmp_path, texts)
    asked = requests(tmp_path)
    assert set(asked) == set("abcde")
    one = asked["a"]
    assert (one["method"], one["url"], one["body"]["model"]) == ("POST", "/v1/chat/completions", "m")
    assert one["body"]["response_format"]["type"] == "json_schema" and len(one["custom_id"]) == 64
    key = {text: row["custom_id"] for text, row in asked.items()}
    results = write_results(tmp_path / "results.jsonl", [
        result(key["b"], "```json\n" + json.dumps(GOOD) + "\n```"),
        {"id": "x", "custom_id": key["c"], "response": {"status_code": 400, "body": {"error": {"message": "long"}}}},
        {"id": "y", "custom_id": key["d"], "response": None, "error": {"code": "batch_expired", "message": "late"}},
        result(key["e"], '{"tags": ["ha', "length"),
        result("0" * 64, json.dumps(GOOD)),
        result(key["a"], json.dumps(GOOD)),
    ])  # fmt: skip
    for _ in range(2):  # the same results again cost nothing again
        counts = tag(tmp_path, BatchTagger(SETTINGS, tmp_path / "cache.sqlite", [results]), len(texts))
        assert (counts["tagged"], counts["failed"], counts["tries"], counts["prompt_tokens"]) == (3, 3, 3, 30)
        assert counts["cost"] == 30 and counts["results_of_other_records"] == 1
    reasons = {row["id"]: (row["reason"], row["detail"]) for row in read_jsonl(tmp_path / "failed.jsonl")}
    assert reasons["s/c"][0] == "HTTP 400" and "long" in reasons["s/c"][1]
    assert reasons["s/d"][0] == "batch error" and "late" in reasons["s/d"][1]
    assert reasons["s/e"][0] == "answer cut off"
    left = requests(tmp_path, "again.jsonl")
    assert set(left) == set("cde") and left["e"]["body"]["temperature"] > 0 == left["c"]["body"]["temperature"]
    more = write_results(tmp_path / "more.jsonl", [result(key[text], json.dumps(GOOD)) for text in "cde"])
    counts = tag(tmp_path, BatchTagger(SETTINGS, tmp_path / "cache.sqlite", [more]), len(texts))
    assert (counts["tagged"], counts["failed"]) == (6, 0)
    assert requests(tmp_path, "none.jsonl") == {} and not (tmp_path / "none.jsonl").exists()


def test_a_file_takes_a_stated_number_of_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 2)
    write_records(tmp_path, ["a", "b", "c", "d", "e"])
    assert set(requests(tmp_path)) == set("abcde")
    assert [len(list(read_jsonl(tmp_path / name))) for name in
            ("requests.jsonl", "requests-2.jsonl", "requests-3.jsonl")] == [2, 2, 1]  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"{", b"[1]\n", b'{"id": 1}\n', b"\xff\xfe\n", b"[" * 100_000, b'{"custom_id": "' + b"x" * 5_000_000]
)
def test_files_that_hold_no_results_are_refused_with_the_line(content, tmp_path):
    write_records(tmp_path, ["a"])
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=r"--batch-in .*bad.jsonl:1: "):
        tag(tmp_path, BatchTagger(SETTINGS, tmp_path / "cache.sqlite", [tmp_path / "bad.jsonl"]), 1)


@pytest.mark.parametrize("form", [lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), gzip.compress])
def test_results_may_have_a_mark_or_be_compressed(form, tmp_path):
    """Results in a .gz file were no UTF-8, and were to be fetched again."""
    write_records(tmp_path, ["a", "b"])
    rows = [result(row["custom_id"], json.dumps(GOOD)) for row in requests(tmp_path).values()]
    path = tmp_path / ("results.jsonl.gz" if form is gzip.compress else "results.txt")
    path.write_bytes(form(write_results(tmp_path / "plain.jsonl", rows).read_bytes()))
    counts = tag(tmp_path, BatchTagger(SETTINGS, tmp_path / "cache.sqlite", [path]), 2)
    assert counts["tagged"] == 2


def test_the_tool_writes_a_batch_for_pool_and_target_and_takes_the_results(tmp_path, call):
    def write(name: str, count: int, seed: int) -> Path:
        lines = (json.dumps(record) + "\n" for record in topic_records(count, seed))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return tmp_path / name

    pool, target = write("pool.jsonl", 12, 0), write("target.jsonl", 3, 1)
    common = ("tag", "--work", tmp_path / "work", "--input", pool, "--target", target, "--tagger", "llm")
    code, out, error = call(*common, "--batch-out", tmp_path / "q.jsonl")
    assert code == 0 and "12 requests" in out and "target, batch: " in out, error
    rows = [row for name in ("q.jsonl", "q-target.jsonl") for row in read_jsonl(tmp_path / name)]
    assert len(rows) == 15 and not (tmp_path / "work" / "tags.jsonl").exists()
    results = write_results(tmp_path / "r.jsonl", [result(row["custom_id"], json.dumps(GOOD)) for row in rows])
    code, out, error = call(*common, "--batch-in", results)
    assert code == 0 and "12 tagged" in out and "target, tag: " in out, error
    assert "stands" in call(*common, "--batch-in", results)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tagger", "llm", "--batch-out", "a", "--batch-in", "b"), "do not go together"),
        (("--batch-out", "a"), "go with --tagger llm"),
        (("--tagger", "llm", "--batch-in", "no-such-file"), "--batch-in no-such-file: no such file"),
        (("--tagger", "llm"), "--llm-url"),
        (("--tags-per-record", "65"), "--tags-per-record 65: from 1 to 64"),
    ],
)
def test_flags_that_cannot_work_cost_one_line(flags, message, tmp_path, call):
    (tmp_path / "pool.jsonl").write_text('{"text": "a"}\n')
    code, _, error = call("tag", "--work", tmp_path / "work", "--input", tmp_path / "pool.jsonl", *flags)
    assert code == 2 and message in error
