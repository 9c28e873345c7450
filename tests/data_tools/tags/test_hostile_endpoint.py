"""Endpoints that answer too much, too late or too cleverly: bounded, held back, listed with the record's name."""

import gzip
import json
import resource
import time
import zlib
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import GOOD, chat_server, completion, good
from test_endpoint_tagger import answers, tagger, write_records

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import score as record_score
from megatron_ksa.data_tools.tags.tag import tag
from megatron_ksa.data_tools.tags.taggers import Answer, Failure
from megatron_ksa.data_tools.tags.taggers.pace import LONGEST_PAUSE, Pace, pause_seconds
from megatron_ksa.data_tools.tags.taggers.prompt import BadAnswer, answer_score, parse_answer
from megatron_ksa.errors import UsageError

CASES = json.loads((Path(__file__).parent / "cases" / "endpoint_answers.json").read_text(encoding="utf-8"))


def reply(message: dict, finish: str = "stop", **usage: object) -> tuple[int, dict, bytes]:
    """A chat completion with any message, reason to finish and usage."""
    choice = {"message": message, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


@pytest.mark.parametrize("kind", CASES)
def test_every_usual_form_of_answer_counts_at_the_first_try(kind, tmp_path):
    """Each of these cost five paid requests and failed."""
    with chat_server(lambda *_: reply({"role": "assistant", **CASES[kind]})) as server:
        found = answers(server, tmp_path, ["x"])["x"]
        assert len(server.requests) == 1
    assert found == Answer(["tide tables", "harbours", "moon"], 7.0, 3.0)


def test_a_gigabyte_of_reply_is_not_read(tmp_path):
    """A 1 GB reply, plain or 1 MB of gzip, took over 8 GB of memory; the record was not named."""
    bomb = gzip.compress(b"a" * 2**26)  # 64 MiB in 65 kB
    kinds = {
        "plain": (200, {}, b'{"choices": "' + b"a" * 20_000_000),
        "gzip": (200, {"Content-Encoding": "gzip"}, bomb),
        "deflate": (200, {"Content-Encoding": "deflate"}, zlib.compress(b"a" * 2**26)),
        "error": (500, {}, b"e" * 20_000_000),
        "brotli": (200, {"Content-Encoding": "br"}, b"x"),
        "cut gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(completion(json.dumps(GOOD)))[:-20]),
        "whole gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(completion(json.dumps(GOOD)))),
    }
    with chat_server(lambda text, *_: kinds[text]) as server:
        write_records(tmp_path, list(kinds))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tag(tmp_path, tagger(server.url, tmp_path, attempts=1, timeout=20.0, max_bytes=1_000_000), len(kinds))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    failed = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "failed.jsonl")}
    assert failed == {
        "s/plain": "reply too large", "s/gzip": "reply too large", "s/deflate": "reply too large",
        "s/error": "HTTP 500", "s/brotli": "broken reply", "s/cut gzip": "connection lost",
    }  # fmt: skip
    detail = next(row["detail"] for row in read_jsonl(tmp_path / "failed.jsonl") if row["id"] == "s/error")
    assert len(detail) < 400
    assert grown < 150_000, f"{grown:,} kB"  # the server is in this process and holds 20 MB replies itself


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (10**400, None), ("1" + "0" * 400, None), ("7", 7.0), (" 7.5 ", 7.5), ("nan", None), ("inf", None),
        (True, None), ("7/10", None), (-(10**400), None), ("", None), (None, None), ([7], None), (0, None),
    ],
)  # fmt: skip
def test_a_score_is_a_number_from_1_to_10_or_its_text(value, score):
    """An integer of 400 digits ended the run in an OverflowError, from an endpoint or in the data."""
    assert answer_score(value) == score
    assert record_score(value) == (None if isinstance(value, str) else score)


@pytest.mark.parametrize(
    "content",
    [
        '{"tags": ["a"], "quality": 1%s, "difficulty": 5}' % ("0" * 400),
        '{"tags": ["a"], "quality": 1%s, "difficulty": 5}' % ("0" * 10_000),
        '{"\\ud800": 1}',
        "[" * 100_000,
        "{" * 100_000,
        '```json\n{"tags": ["a"]}\n```',
        "<think>" + json.dumps(GOOD),
        [{"type": "image_url"}],
        [],
        {"text": json.dumps(GOOD)},
        7,
    ],
)
def test_hostile_contents_are_bad_answers_that_can_be_written(content):
    with pytest.raises(BadAnswer) as error:
        parse_answer(content)
    str(error.value).encode("utf-8")


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b"null", b'{"choices": {"0": 1}}', b'{"choices": ["a"]}', b'{"choices": [{"message": "content"}]}',
        b'{"choices": [{"message": ["content"]}]}', b"[" * 200_000, b'\xff\xfe{"choices": []}', b"1" * 5000,
    ],
)  # fmt: skip
def test_bodies_that_are_no_completion_are_listed(body, tmp_path):
    with chat_server(lambda *_: (200, {}, body)) as server:
        assert answers(server, tmp_path, ["x"], attempts=1)["x"].reason == "broken reply"


@pytest.mark.parametrize("usage", [{"prompt_tokens": 10**400}, {"prompt_tokens": -5, "completion_tokens": "7"}])
def test_absurd_counts_of_tokens_count_as_none(usage, tmp_path):
    """A count beyond 64 bits ended the run when it was stored."""
    with chat_server(lambda *_: reply({"content": json.dumps(GOOD)}, **usage)) as server:
        write_records(tmp_path, ["x"])
        counts = tag(tmp_path, tagger(server.url, tmp_path), 1)
    assert counts["prompt_tokens"] == counts["answer_tokens"] == 0


def test_thoughts_beside_the_answer_are_not_the_answer_and_an_answer_cut_off_is_named(tmp_path):
    thought = {"content": None, "reasoning_content": "let me think " * 40}
    with chat_server(lambda *_: reply(thought, "length", completion_tokens=512)) as server:
        found = answers(server, tmp_path, ["x"], attempts=5)["x"]
        # At another temperature the answer may be shorter, once.
        assert len(server.requests) == 2
    assert found.reason == "answer cut off" and found.attempts == 2
    for word in ("finish_reason length", "512 tokens", "--llm-max-tokens"):
        assert word in found.detail
    whole = {"content": json.dumps(GOOD), "reasoning_content": '{"tags": ["wrong"], "quality": 1, "difficulty": 1}'}
    with chat_server(lambda *_: reply(whole, "length")) as server:
        assert answers(server, tmp_path, ["y"])["y"] == Answer(GOOD["tags"], 7.0, 3.0)
    with chat_server(lambda *_: reply({"content": None, "refusal": "I won't."})) as server:
        assert "I won't." in answers(server, tmp_path, ["z"], attempts=1)["z"].detail


def test_extra_fields_replace_the_limit_and_null_takes_a_field_out(tmp_path):
    extra = '{"max_completion_tokens": 9000, "temperature": null, "chat_template_kwargs": {"enable_thinking": false}}'
    with chat_server(lambda *_: good()) as server:
        answers(server, tmp_path, ["x"], extra_text=extra)
        request = server.requests[0]
    assert request["max_completion_tokens"] == 9000 and request["chat_template_kwargs"] == {"enable_thinking": False}
    assert "max_tokens" not in request and "temperature" not in request


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 99}, {"extra_text": '{"max_completion_tokens": 99}'}, {"timeout": 5.0, "concurrency": 1}]
)
def test_a_changed_limit_asks_failed_records_only(changes, tmp_path):
    """Every record was asked and paid for again when --llm-max-tokens changed."""
    texts = ["good", "cut off"]

    def behave(text, attempt, request):
        return good() if text == "good" else reply({"content": '{"tags": ["ha'}, "length")

    with chat_server(behave) as server:
        answers(server, tmp_path, texts)
    with chat_server(lambda *_: good()) as server:
        found = answers(server, tmp_path, texts, **changes)
        assert list(server.attempts) == ["cut off"]
    assert all(isinstance(answer, Answer) for answer in found.values())


def test_equal_records_are_asked_once(tmp_path):
    with chat_server(lambda *_: good()) as server:
        records = write_records(tmp_path, ["same"] * 20)
        one = tagger(server.url, tmp_path, concurrency=8)
        assert len(list(one.answers(records, 20))) == 20
        assert len(server.requests) == 1
    assert one.totals()["prompt_tokens"] == 10
    with chat_server(lambda *_: (413, {}, b"no")) as server:
        records = write_records(tmp_path, ["other"] * 5)
        found = list(tagger(server.url, tmp_path).answers(records, 5))
        assert len(server.requests) <= 1 and all(isinstance(answer, Failure) for answer in found)


def test_when_all_fail_the_endpoint_s_word_is_shown_and_every_record_listed(tmp_path):
    """The message was lost together with failed.jsonl."""
    (tmp_path / "tags.jsonl").write_text('{"id": "of an older run"}\n')
    with chat_server(lambda *_: (400, {}, b"context length is 16 tokens \x1b[31m")) as server:
        write_records(tmp_path, ["a", "b", "c"])
        with pytest.raises(UsageError, match="context length is 16 tokens") as error:
            tag(tmp_path, tagger(server.url, tmp_path), 3)
    assert "\x1b" not in str(error.value) and "failed.jsonl" in str(error.value)
    failed = list(read_jsonl(tmp_path / "failed.jsonl"))
    assert len(failed) == 3 and all("context length" in row["detail"] for row in failed)
    assert not (tmp_path / "tags.jsonl").exists()


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.mark.parametrize(
    ("header", "date", "seconds"),
    [
        ("7", None, 7), ("0", None, 0), ("-3", None, 0), ("nan", None, 0), ("inf", None, LONGEST_PAUSE),
        ("1" * 400, None, LONGEST_PAUSE), ("Wed, 21 Oct 2026 07:28:09 GMT", DATE, 9), (DATE, DATE, 0),
        ("Wed, 21 Oct 9999 07:28:09 GMT", DATE, LONGEST_PAUSE), ("soon", None, 0), (None, None, 0), ("", DATE, 0),
        ("Wed, 99 Foo 2026", DATE, 0),
    ],
)  # fmt: skip
def test_both_forms_of_retry_after(header, date, seconds):
    """The form with a date counted as none."""
    assert pause_seconds(header, date) == seconds


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_back_every_request(form, tmp_path):
    """Only the record that had been refused waited; all others went on asking."""
    times = []

    def behave(text, attempt, request):
        times.append(time.monotonic())
        if len(times) == 2:
            time.sleep(0.5)  # until the client has read the refusal: its next request would be on the way before
        # A date has whole seconds, so that 3 s are 2 at least.
        after = "2" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
        return (429, {"Retry-After": after}, b"slow down") if len(times) == 1 else good()

    with chat_server(behave) as server:
        found = answers(server, tmp_path, [str(i) for i in range(12)], concurrency=2, backoff=0.0, timeout=20.0)
    assert all(isinstance(answer, Answer) for answer in found.values())
    # One other request may have been on its way.
    assert len([t for t in times if t - times[0] < 1.5]) <= 2 and times[-1] - times[0] >= 1.5


def test_fewer_requests_at_a_time_after_an_overload_and_more_again(tmp_path):
    pace = Pace(16)
    pace.overloaded(time.monotonic())
    assert pace.limit == 8
    pace.overloaded(0.0)  # began before the halving
    assert pace.limit == 8
    for _ in range(2000):
        pace.succeeded()
    assert pace.limit == 16 and pace.lowest == 8

    busy = 4

    def behave(text, attempt, request):
        with server.lock:
            now = server.now
        time.sleep(0.02)
        return (429, {}, b"busy") if now > busy else good()

    with chat_server(behave) as server:
        found = answers(server, tmp_path, [str(i) for i in range(60)], concurrency=16, attempts=20, backoff=0.01)
        refused = len(server.requests) - 60
    assert all(isinstance(answer, Answer) for answer in found.values())
    assert refused < 120, refused


def test_several_endpoints_share_the_records_and_one_that_fails_is_left(tmp_path):
    def slow(*_):
        time.sleep(0.03)
        return good()

    with chat_server(slow) as one, chat_server(slow) as other, chat_server(lambda *_: (500, {}, b"")) as broken:
        records = write_records(tmp_path, [str(i) for i in range(40)])
        url = f"{one.url},{other.url}, {broken.url}"
        found = list(tagger(url, tmp_path, concurrency=3, attempts=6, timeout=5.0).answers(records, 40))
        assert all(isinstance(answer, Answer) for answer in found)
        assert min(len(one.requests), len(other.requests)) >= 10
        assert len(one.requests) + len(other.requests) == 40
