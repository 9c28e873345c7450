"""Evaluation data in the pool: what is found, what is not, and that it is left out before anything is chosen."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_duplicates import CASES, WORDS, chat, write_records

from megatron_ksa.data_tools.tags.decontaminate import (
    DecontaminationSettings,
    contaminated_lines,
    decontaminate,
    read_questions,
)
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tokenizers import write_byte_level
from megatron_ksa.errors import UsageError


def found(
    tmp_path: Path, pool: list[dict], questions: list[dict], engine: Engine | None = None, **settings
) -> list[dict]:
    """Rows of `contaminated.jsonl`."""
    folder, target = write_records(tmp_path / "pool", pool), write_records(tmp_path / "target", questions)
    write_jsonl(folder / "duplicates.jsonl", [])
    counts = decontaminate(folder, DecontaminationSettings(**settings), target, engine or Engine(), len(pool))
    rows = list(read_jsonl(folder / "contaminated.jsonl"))
    assert counts["contaminated"] == len(rows)
    return rows


def words(generator: np.random.Generator, count: int) -> str:
    return " ".join(generator.choice(WORDS, count))


def test_copies_near_copies_and_quotes_of_a_question_are_found_with_both_sides(tmp_path):
    generator = np.random.default_rng(0)
    question = words(generator, 30)
    edited = question.split()
    edited[10] = edited[20] = "edited"
    pool = [
        chat(question, "yes"), chat(f"{words(generator, 50)} {question} {words(generator, 50)}", "yes"),
        chat(words(generator, 20), f"I know that one: {question}"), {"text": f"{words(generator, 50)} {question}"},
        chat(" ".join(edited), "no"), chat(words(generator, 30), "yes"),
    ]  # fmt: skip
    rows = found(tmp_path, pool, [chat(question, "an answer"), chat(words(generator, 30), "yes")])
    assert [row["record"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["overlap"] for row in rows[:4]] == [1.0] * 4
    for row in rows[:4]:
        assert row["text"] == row["question_text"] == question
        assert row["question"] == "s/0" and row["evaluation"] == "target" and row["id"] == f"s/{row['record']}"
    assert rows == found(
        tmp_path, pool, [chat(question, "an answer"), chat(words(generator, 30), "yes")], Engine(workers=2)
    )


def test_edits_all_over_a_question_are_found_by_minhash(tmp_path):
    generator = np.random.default_rng(0)
    question = words(generator, 15).split()
    edited = list(question)
    edited[7] = "edited"
    rows = found(tmp_path, [chat(" ".join(edited), "")], [chat(" ".join(question), "")])
    assert [row["reason"] for row in rows] == ["minhash"] and rows[0]["overlap"] == pytest.approx(10 / 16, abs=1e-4)


def test_a_benchmarks_template_and_other_numbers_are_no_leak(tmp_path):
    """Tasks of one kind share all but their numbers: a target of such tasks does not empty the pool of the kind."""
    template = (
        "Answer the question with one number and nothing else. Explain no step of your work to anybody. Question:"
    )
    generator = np.random.default_rng(0)
    questions = [chat(f"{template} {words(generator, 3)}", "1") for _ in range(5)]
    assert found(tmp_path, [chat(f"{template} {words(generator, 3)}", "1")], questions) == []
    sums = [chat(f"Please add the two whole numbers {n} and {n + 1} and tell me the sum", "1") for n in range(2)]
    other = chat("Please add the two whole numbers 7 and 8 and tell me the sum", "1")
    assert [row["record"] for row in found(tmp_path, [other, sums[1]], sums)] == [1]
    # A question that is all template is found as a whole.
    assert [
        row["record"] for row in found(tmp_path, [chat(template, "1"), other], [*questions, chat(template, "1")])
    ] == [0]


def test_questions_too_short_to_tell_are_counted(tmp_path):
    pool = [chat("Why is that?", "Because."), chat("How many legs has a crab?", "10")]
    rows = found(tmp_path, pool, [chat("Why?", ""), chat("How many legs has a crab?", "")])
    assert [row["record"] for row in rows] == [1]


def test_bad_settings_and_files(tmp_path):
    with pytest.raises(UsageError, match="--contamination-overlap 0.0: above 0"):
        DecontaminationSettings(overlap=0.0)
    with pytest.raises(UsageError, match="--contamination-similarity 2.0"):
        DecontaminationSettings(similarity=2.0)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    write_records(tmp_path / "pool", [chat("a", "b")])
    with pytest.raises(UsageError, match=r"--decontaminate .*bad.jsonl: no record that can be used"):
        decontaminate(
            tmp_path / "pool", DecontaminationSettings((str(tmp_path / "bad.jsonl"),)), None, Engine(), 1
        )  # fmt: skip


def run(call, folder: Path, *arguments: object) -> tuple[set[str], str]:
    """Ids that were chosen of the case's pool with its target, and what was printed."""
    code, output, error = call(
        "--work", folder, "--input", CASES / "pool_with_target_copies.jsonl", "--budget", "4", "--rare-tags", 1,
        "--duplicate-similarity", 0, "--tokenizer-model", folder.parent / "tokenizer", *arguments,
    )  # fmt: skip
    assert code == 0, error
    chosen = {row["id"] for row in read_jsonl(folder / "selection.jsonl")}
    questions = {row["id"]: row["messages"][0]["content"] for row in read_jsonl(folder / "records.jsonl")}
    return {questions[name] for name in chosen}, output


def test_near_copies_of_the_target_are_left_out_before_sampling_unless_a_flag_keeps_them(tmp_path, call):
    """Alignment chose the four near-copies of the target: it looks for what is like the target."""
    write_byte_level(tmp_path / "tokenizer")
    target = ("--target", CASES / "target.jsonl", "--align-weight", 5)
    chosen, output = run(call, tmp_path / "work", *target)
    assert len(chosen) == 4 and all(question.startswith("Which sea") for question in chosen)
    assert "decontaminate: 4 contaminated; 4 left out; 4 questions; 4 questions found" in output
    rows = list(read_jsonl(tmp_path / "work" / "contaminated.jsonl"))
    assert rows[0]["text"] == rows[0]["question_text"] == "how many legs has a crab" and rows[0]["left_out"]
    assert len(contaminated_lines(tmp_path / "work")) == 4
    kept, output = run(call, tmp_path / "work", *target, "--keep-contaminated")
    assert any("legs" in question for question in kept) and "4 contaminated; 0 left out" in output
    without, output = run(call, tmp_path / "work", *target, "--no-decontaminate-target")
    assert without == kept and "0 contaminated; 0 questions" in output


def test_files_to_decontaminate_against_need_no_target(tmp_path, call):
    write_byte_level(tmp_path / "tokenizer")
    chosen, output = run(call, tmp_path / "work", "--decontaminate", CASES / "target.jsonl")
    assert all(question.startswith("Which sea") for question in chosen) and "4 left out" in output
    row = next(read_jsonl(tmp_path / "work" / "contaminated.jsonl"))
    assert row["evaluation"].endswith("target.jsonl")
    summary = json.loads((tmp_path / "work" / "selection.json").read_text())
    assert summary["contaminated"] == 4 and summary["pool_instances"] == 6
    code, _, error = call(
        "sample", "--work", tmp_path / "work", "--decontaminate", tmp_path / "no.jsonl", "--budget", "2"
    )  # fmt: skip
    assert code == 2 and f"--decontaminate {tmp_path / 'no.jsonl'}: no such file" in error


def test_files_that_are_no_data_are_refused_by_the_flag_that_names_them(tmp_path, call):
    """The flag's name was passed as suffixes to allow: notes.md was read, as it ends in one of "--decontaminate".

    The errors said --input and --glob, and listed the flag's letters among the formats.
    """
    write_byte_level(tmp_path / "tokenizer")
    run(call, tmp_path / "work")
    (tmp_path / "notes.md").write_text("Which sea has the most salt?\n")
    for folder in ("folder", "splits"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / f"{split}-00000-of-00001.parquet").write_bytes(b"")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Which sea has the most salt?"}')[:-4])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut.arrow").write_bytes(b"ARROW1")
    (tmp_path / "cut.json").write_text('[{"text": "Which"}')
    for name, told in (
        ("notes.md", "a file must be one of .jsonl, "), ("no.jsonl", "no such file"),
        ("folder", "no .txt and no .jsonl, .*; name the files"),
        ("splits", "holds the splits .*; name the files of one"),
        ("cut.jsonl.gz", "truncated or damaged"), ("cut.parquet", "not a Parquet file"),
        ("cut.arrow", "not an Arrow file"), ("cut.json", "the JSON array cannot be read"),
    ):  # fmt: skip
        path = tmp_path / name
        code, _, error = call("sample", "--work", tmp_path / "work", "--decontaminate", path, "--budget", "2")
        assert code == 2 and re.search(f"--decontaminate {path}: {told}", error), error
        assert "--input" not in error and "--glob" not in error and " d, e, c" not in error


def test_evaluations_are_read_in_every_format_of_a_pool(tmp_path, call):
    """A folder of evaluations was searched for .txt files alone, and a `save_to_disk` folder was none."""
    import pyarrow
    from pyarrow import ipc

    write_byte_level(tmp_path / "tokenizer")
    run(call, tmp_path / "work")
    rows = [json.loads(line) for line in (CASES / "target.jsonl").read_text().splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with ipc.new_stream(str(tmp_path / "saved" / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text((CASES / "target.jsonl").read_text())
    for name in ("saved", "lines"):
        chosen, output = run(call, tmp_path / "work", "--decontaminate", tmp_path / name)
        assert "4 left out" in output and all(question.startswith("Which sea") for question in chosen)


def test_a_target_keeps_its_copies(tmp_path, call):
    """A target was de-duplicated like a pool: its weights were not its author's."""
    write_byte_level(tmp_path / "tokenizer")
    lines = (CASES / "target.jsonl").read_text().splitlines()
    (tmp_path / "target.jsonl").write_text("\n".join([*lines, *lines[:2], lines[0].replace("has", "had")]) + "\n")
    run(call, tmp_path / "work", "--target", tmp_path / "target.jsonl", "--id-field", "none")
    assert (tmp_path / "work" / "target" / "duplicates.jsonl").read_text() == ""


def test_evaluations_that_are_not_compared_are_listed(tmp_path, call):
    """Records that cannot be read, or are too short, were counted only, and an empty file was no mistake."""
    write_byte_level(tmp_path / "tokenizer")
    lines = (CASES / "target.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join([lines[0], "{bad", '{"text": "two words"}']) + "\n")
    run(call, tmp_path / "work", "--decontaminate", tmp_path / "some.jsonl")
    listed = list(read_jsonl(tmp_path / "work" / "evaluation_skipped.jsonl"))
    assert [(each["origin"].rpartition(":")[2], each["reason"]) for each in listed] == [
        ("2", "unreadable"), ("3", "too_short"),
    ]  # fmt: skip
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="--decontaminate .*empty.jsonl: no record that can be used"):
        read_questions(None, [tmp_path / "empty.jsonl"])
