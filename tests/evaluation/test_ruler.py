"""RULER's tasks: what each hides and asks for, its length, and its scores by a decoder that knows or does not."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from test_needle import ESSAY

from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.questions import read_questions
from megatron_ksa.evaluation.ruler import Cell, averages, build, evaluate, plot, score_table
from megatron_ksa.evaluation.ruler_tasks import HOPS, TASKS
from megatron_ksa.evaluation.string_match import all_parts, any_part
from megatron_ksa.evaluation.text_language import TextLanguage

RECORDS = [
    {"question": f"Who keeps the light of number {i}?",
     "context": [f"Light {i} is kept by Keeper{i}. " + "It shines. " * i], "answers": [f"Keeper{i}", "nobody at all"]}
    for i in range(30)
]  # fmt: skip
# Bytes as tokens; prompts are ASCII.
LANGUAGE = TextLanguage(lambda text: list(text.encode("ascii")), lambda ids: bytes(ids).decode("ascii"), ESSAY)
LENGTHS = {"short": 3000, "long": 12000}


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps(RECORDS))
    return read_questions(tmp_path / "questions.json")


def text_of(sample) -> str:
    return LANGUAGE.decode(sample.prompt)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("task", [*TASKS, "qa"])
def test_length_answers_and_scores(task, length, questions):
    samples, skipped = build(task, LANGUAGE, length, 3, 7, questions)
    assert len(samples) == 3 and skipped == 0 and samples[0] != samples[1]
    assert build(task, LANGUAGE, length, 3, 7, questions)[0] == samples
    assert build(task, LANGUAGE, length, 3, 8, questions)[0] != samples
    for sample in samples:
        slack = 800 if task == "qa" else 300
        assert length - slack <= len(sample.prompt) + sample.new_tokens <= length
        text = text_of(sample)
        assert sample.score(text, sample.answers[:1]) == 1
        if task != "qa":
            assert all(answer in text for answer in sample.answers)
        assert sample.score("Nothing is known.", sample.answers) == 0
        assert sample.score(f"it is {sample.answers[0].upper()}!", sample.answers) == (
            1 if task == "qa" else 1 / len(sample.answers)
        )


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_variables_are_those_of_the_chain(length):
    for sample in build("vt", LANGUAGE, length, 4, 0)[0]:
        shown, text = text_of(sample).rsplit("Memorize and track", 1)
        value = re.search(r"assigned the value (\d+) in the text above", text).group(1)
        holders = {name for name, told in re.findall(r"VAR ([A-Z]{5}) = (\d+)", text) if told == value}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", text):
            if source in holders:
                holders.add(name)
        assert set(sample.answers) == holders and len(holders) == HOPS + 1
        # The solved example before it has another chain, and its answer.
        solved = re.search(r"they are: ((?:[A-Z]{5} ?){5})\n", shown).group(1).split()
        assert len(set(solved) - holders) == HOPS + 1


@pytest.mark.parametrize(("length", "often", "seldom"), [(3000, 6, 1), (12000, 30, 3)])
def test_common_words_are_the_most_common(length, often, seldom):
    for sample in build("cwe", LANGUAGE, length, 4, 0)[0]:
        example, text = text_of(sample).split("Below is a numbered list")[1:]
        numbered = re.findall(r"(\d+)\. (\w+)", text.split("\n")[1])
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        assert {word for word, count in counts.items() if count == often} == set(sample.answers)
        assert len(sample.answers) == 10 and set(counts.values()) == {often, seldom}
        assert not set(sample.answers) & {word for _, word in re.findall(r"(\d+)\. (\w+)", example)}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_frequent_words_are_the_most_frequent(length):
    for sample in build("fwe", LANGUAGE, length, 4, 0)[0]:
        body = text_of(sample).split("coded words. ", 1)[1].split("\nQuestion")[0]
        ranked = Counter(body.split()).most_common()
        assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == list(sample.answers)
        assert ranked[3][1] > ranked[4][1]


def test_documents_of_questions(questions):
    """The question's own document stands among others, numbered in order; a file of few repeats them."""
    for sample in build("qa", LANGUAGE, 12000, 5, 0, questions)[0]:
        text = text_of(sample)
        assert text.count(f"kept by {sample.answers[0]}.") == 1
        numbers = [int(number) for number in re.findall(r"Document (\d+):", text)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 30
        assert sample.score("Nobody at all.", sample.answers) == 1


def test_questions_that_do_not_fit_are_counted(questions):
    samples, skipped = build("qa", LANGUAGE, 560, 30, 0, questions)
    assert len(samples) + skipped == 30 and 0 < skipped < 30
    with pytest.raises(UsageError, match="each has documents of more than 200 tokens"):
        build("qa", LANGUAGE, 200, 5, 0, questions)


BROKEN = {
    "no JSON": ("{", "is not JSON"),
    "an object": ('{"data": []}', "is no JSON list of questions"),
    "nothing": ("[]", "has no questions"),
    "a string": ('["a"]', "record 1 is no object"),
    "no answers": (json.dumps([*RECORDS[:2], {**RECORDS[2], "answers": []}]), r"record 3: answers is \[\]"),
    "a number": (json.dumps([{**RECORDS[0], "context": 3}]), "record 1: context is 3"),
    "an empty text": (json.dumps([{**RECORDS[0], "question": " "}]), "record 1: question is ' '"),
    "deep": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_questions(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_questions(tmp_path / "questions.json")


def test_questions_a_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS[:2])) + "\n\n")
    assert [question.answers[0] for question in read_questions(path).questions] == ["Keeper0", "Keeper1"]
    path.write_text(json.dumps(RECORDS[0]) + "\n{\n")
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        read_questions(path)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length(task):
    with pytest.raises(UsageError, match="150 tokens are too few"):
        build(task, LANGUAGE, 150, 1, 0)


@pytest.mark.parametrize("task", ["vt", "niah_multiquery"])
def test_the_least_length_that_is_named_works(task):
    with pytest.raises(UsageError) as refused:
        build(task, LANGUAGE, 500, 1, 0)
    least = int(re.search(r"(\d+) are needed", str(refused.value)).group(1))
    build(task, LANGUAGE, least, 1, 0)
    with pytest.raises(UsageError):
        build(task, LANGUAGE, least - 1, 1, 0)


def test_string_match():
    assert all_parts("They are: ABC and DEF.", ["abc", "DEF", "GHI"]) == pytest.approx(2 / 3)
    assert any_part("the Red Sea", ["red sea", "blue"]) == 1 and any_part("", ["red"]) == 0


@pytest.mark.parametrize("task", ["niah_multivalue", "vt", "qa"])
def test_evaluate_batches_and_scores(task, questions):
    """A decoder that copies what the prompt holds is right; batches are no larger than asked for."""
    sizes = []

    def reads_everything(prompts, new_tokens):
        sizes.append(len(prompts))
        return [list(prompt) for prompt in prompts]

    cell = evaluate(reads_everything, LANGUAGE, task, 3000, cases=5, tokens_per_batch=6500, questions=questions)
    assert (cell.score, cell.cases, sizes) == (1.0, 5, [2, 2, 1]) and 2000 < cell.tokens <= 3000
    nothing = evaluate(lambda p, n: [[] for _ in p], LANGUAGE, task, 3000, cases=2, tokens_per_batch=1,
                       questions=questions)  # fmt: skip
    assert nothing.score == 0 and nothing.texts == ["", ""]


def test_average_table_and_chart(tmp_path):
    scores = [("vt", 4096, 1.0), ("cwe", 4096, 0.5), ("vt", 8192, 0.5), ("cwe", 8192, 0.0), ("vt", 100, 1.0)]
    cells = [Cell(task, length, 1, score, 9.0) for task, length, score in scores]
    assert averages(cells) == {4096: 0.75, 8192: 0.25}
    lines = score_table(cells).splitlines()
    assert lines[0] == "| task | 100 | 4k | 8k |" and lines[-1] == "| average of 2 | - | 75.0 | 25.0 |"
    plot({"one": cells, "other": cells[:2]}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert np.isclose(averages(cells[:2])[4096], 0.75)


def test_questions_with_unicode_line_ends(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are: a line of a .jsonl file was cut there, and refused as no JSON."""
    path = tmp_path / "questions.jsonl"
    record = {**RECORDS[0], "context": "One.\u2028Two.\x85Three.\x0bFour."}
    path.write_text(f"{json.dumps(record, ensure_ascii=False)}\r\n" * 2, newline="")
    assert [question.text for question in read_questions(path).questions] == [record["question"]] * 2


def test_half_of_a_surrogate_pair(tmp_path):
    """It has no UTF-8: the tokenizer's traceback came when the question's turn had come."""
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([RECORDS[0], {**RECORDS[1], "context": "half \ud800"}]))
    with pytest.raises(UsageError, match="record 2: context is no UTF-8 text"):
        read_questions(path)


def test_a_question_that_cannot_be_encoded_is_not_too_long(questions):
    """Any reason to refuse a question was counted as one of documents that are too long."""

    def encode(text):
        if "Keeper3." in text:
            raise UsageError("a prompt: a part of the text has no token")
        return list(text.encode("ascii"))

    language = TextLanguage(encode, LANGUAGE.decode, ESSAY)
    with pytest.raises(UsageError, match="has no token"):
        build("qa", language, 12000, 30, 0, questions)
