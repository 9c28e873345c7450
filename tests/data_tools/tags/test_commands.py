"""`preprocess_tags.py sample`, `write` and `report`: alone, again, and refused in one line."""

import shutil
import sys

import pytest
from raw_pool import write_pool
from work_folder import make_work_folder

from megatron_ksa.data_tools.tags.pipeline import COMMANDS, Pipeline, _sentence
from megatron_ksa.data_tools.tags.step import Context
from megatron_ksa.data_tools.tokenizers import write_byte_level


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A work folder after `sample`."""
    folder = tmp_path_factory.mktemp("worked")
    pool = write_pool(folder / "pool.jsonl", count=40)
    steps = [step for name in ("tag", "tree", "sample") for step in COMMANDS[name].steps]
    settings = {config: config() for step in steps for config in step.settings.values()}
    Pipeline(Context(folder / "work", inputs=(pool,)), settings, lambda line: None).run(steps)
    return folder / "work"


def test_commands_run_once_and_stand_until_something_changes(tmp_path, call):
    work = make_work_folder(tmp_path / "work", instances=60)
    for name in ("rejected.jsonl", "failed.jsonl", "duplicates.jsonl", "unplaced.jsonl"):
        (work / name).touch()
    tokenizer = ("--tokenizer-model", work / "tokenizer", "--template", "chatml")
    steps = [
        ("sample", ("--budget", "2kt", *tokenizer)),
        ("write", (*tokenizer, "--loss-on", "responses")),
        ("report", ()),
    ]
    for stands in (False, True):
        for step, flags in steps:
            code, out, _ = call(step, "--work", work, *flags)
            assert code == 0 and (f"{step}: stands" in out) == stands, out
    assert "--data-args-path" in call("write", "--work", work, *steps[1][1])[1]
    assert (work / "report" / "index.html").is_file() and (work / "blend" / "blend.txt").is_file()
    assert "sample: stands" not in call("sample", "--work", work, "--budget", "10%", *tokenizer)[1]
    assert "write: stands" not in call("write", "--work", work, *steps[1][1])[1]


def test_no_older_output_stays_beside_newer_input(tmp_path, call):
    """A write step that aborted once left the blend of the last selection beside a new one."""
    work = make_work_folder(tmp_path / "work", instances=60)
    for name in ("rejected.jsonl", "failed.jsonl", "duplicates.jsonl", "unplaced.jsonl"):
        (work / name).touch()
    tokenizer = ("--tokenizer-model", work / "tokenizer")
    for step, flags in (("sample", ("--budget", "50%")), ("write", tokenizer), ("report", ())):
        assert call(step, "--work", work, *flags)[0] == 0
    # A mistake in the flags leaves what fits together alone.
    assert call("write", "--work", work, *tokenizer, "--repeat", "nothing=2")[0] == 2
    assert call("sample", "--work", work, "--budget", "61")[0] == 2
    assert (work / "blend" / "blend.txt").exists() and (work / "report").exists()
    code, out, _ = call("sample", "--work", work, "--budget", "20%")
    assert code == 0 and not (work / "blend").exists() and not (work / "report").exists()
    assert "write: what it wrote is removed, since selection.jsonl is another now" in out and "report: what" in out
    assert call("write", "--work", work, *tokenizer, "--template", "tokenizer")[0] == 2
    assert not (work / "blend").exists() and not (work / "UNFINISHED.txt").exists()
    assert call("write", "--work", work, *tokenizer)[0] == 0 and (work / "blend" / "blend.txt").exists()


def test_a_run_without_a_target_forgets_that_of_an_earlier_one(tmp_path, call):
    pool, target = write_pool(tmp_path / "pool.jsonl"), write_pool(tmp_path / "target.jsonl", count=12, seed=1)
    flags = ("--work", tmp_path / "work", "--input", pool)
    assert call("tag", *flags, "--target", target)[0] == 0
    for command in ("tree", "sample"):
        assert call(command, "--work", tmp_path / "work")[0] == 0
    (tmp_path / "work" / "target" / "tag_cache").mkdir()
    # A mistake in the flags forgets nothing.
    assert call("tag", *flags, "--tagger", "llm")[0] == 2
    assert (tmp_path / "work" / "target" / "manifest.json").exists()
    out = call("tag", *flags)[1]
    assert "what an earlier run made of one is removed" in out
    # A selection that follows the target stayed, and `write` took it.
    assert "sample: what it wrote is removed, since target/grounding.npz" in out
    assert not (tmp_path / "work" / "selection.jsonl").exists()
    # What an endpoint was paid for stays.
    assert [path.name for path in (tmp_path / "work" / "target").iterdir() if path.suffix != ".json"] == ["tag_cache"]
    assert "target, " not in call("tree", "--work", tmp_path / "work")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--budget", "61"), "error: --budget 61: the pool has 60 instances"),
        (("sample", "--budget", "1kt"), "error: --budget 1kt: tokens can be counted only with --tokenizer-model"),
        (("sample", "--budget", "5%,"), "error: --budget : not one of an integer (instances)"),
        (("sample", "--budget", "5%,1%"), "error: --budget 5%,1%: several budgets rise"),
        (("sample", "--budget", "5%,1kt", "--tokenizer-model", "x"), "error: --budget 5%,1kt: several budgets rise"),
        (("sample", "--align-weight", "-1"), "error: --align-weight -1.0"),
        (("write",), "error: --tokenizer-model is needed"),
        (("report",), "selection.jsonl does not exist: run the step that writes it first"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, call, arguments, message):
    work = make_work_folder(tmp_path / "work", instances=60)
    before = sorted(path.name for path in work.iterdir())
    code, _, error = call(arguments[0], "--work", work, *arguments[1:])
    assert code == 2 and message in error
    assert set(path.name for path in work.iterdir()) - set(before) <= {
        ".digests.json", "evaluation_skipped.jsonl", "manifest.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("nan", "not one of an integer"), ("0%", "choose at least one"), ("50%,5%", "several budgets rise"),
        ("2kt", "tokens can be counted only with --tokenizer-model"),
    ],
)  # fmt: skip
def test_a_budget_that_no_pool_can_meet_is_told_before_anything_runs(tmp_path, call, budget, message):
    """It was told after every record had been tagged, which an LLM takes hours and money for."""
    (tmp_path / "pool.jsonl").write_text('{"text": "a text"}\n')
    flags = ("--work", tmp_path / "work", "--input", tmp_path / "pool.jsonl", "--budget", budget)
    if budget == "2kt":
        (tmp_path / "work").mkdir()
        code, _, error = call("sample", "--work", tmp_path / "work", "--budget", budget)
    else:
        code, _, error = call(*flags, "--tokenizer-model", tmp_path / "tokenizer")
    assert code == 2 and error.startswith("error: --budget ") and message in error
    assert not (tmp_path / "work" / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokenizer-model", "nowhere"), "--tokenizer-model nowhere: no such file"),
        (("--template", "tokenizer"), "has no chat template"),
        (("--budget", "5%,10%", "--of-budget", "3"), "--of-budget 3: --budget 5%,10% has 2"),
        (("--parts", "2", "--budget", "5%,10%"), "--parts: not with"), (("--repeat", "a=1e308"), "--repeat a=1e308"),
        (("--always", "ids.jsonl"), "no JSON"), (("--embedding-model", "x"), "--embedding-model needs a package"),
        (("--duplicate-model", "x", "--duplicate-cosine", "0.9"), "--duplicate-model needs a package"),
        (("--duplicate-model", "x"), "no effect without --duplicate-cosine"),
        (("--target", "nowhere"), "error: --target nowhere: no such file or folder"),
    ],
)  # fmt: skip
def test_what_later_steps_would_refuse_is_told_before_anything_runs(tmp_path, call, monkeypatch, flags, message):
    """A tokenizer that is not there, or without a chat template, was told after hours of tagging."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    pool = write_pool(tmp_path / "pool.jsonl")
    (tmp_path / "ids.jsonl").write_text("ids\n")
    write_byte_level(tmp_path / "bytes")
    code, out, error = call("--work", "work", "--input", pool, "--tokenizer-model", "bytes", *flags)
    assert code == 2 and message in error and "read:" not in out, error
    assert not (tmp_path / "work" / "records.jsonl").exists()


def test_a_work_folder_that_is_a_file_is_told(tmp_path, call):
    """It said that the lock file exists and to make room."""
    pool = write_pool(tmp_path / "pool.jsonl")
    code, _, error = call("--work", pool, "--input", pool, "--budget", "5%")
    assert (code, error) == (2, f"error: --work {pool}: a file, where a folder is needed")


def test_a_work_folder_that_is_not_there_is_not_made(tmp_path, call):
    """A misspelt folder was made, and `sample` wrote empty files into it."""
    for command, *flags in (("tree",), ("sample",), ("export", "--export", "jsonl"), ("write",), ("report",)):
        code, _, error = call(command, "--work", tmp_path / "typo", *flags)
        assert code == 2 and error == f"error: --work {tmp_path / 'typo'}: no such folder; the tag command makes it"
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("flag", ["--input", "--target", "--decontaminate"])
def test_a_work_folder_among_the_data_is_refused(tmp_path, call, flag):
    """A second run read records.jsonl, tags.jsonl and the rest of the first as data."""
    (tmp_path / "data").mkdir()
    pool = write_pool(tmp_path / "data" / "pool.jsonl")
    flags = ("--input", tmp_path / "data") if flag == "--input" else ("--input", pool, flag, tmp_path / "data")
    code, _, error = call("--work", tmp_path / "data" / "work", *flags, "--tokenizer-model", "x")
    assert code == 2 and f"lies in {flag} {tmp_path / 'data'}" in error
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pool.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --work, --input"),
        (("sampel", "--work", "x"), "sampel: no command; there are tag, tree, sample"),
        (("tag", "--work", "x", "--input", "y", "--budget", "5%"), "--budget 5%: of the sample command"),
        (("tag", "--work", "x", "--input", "y", "--badget=5%"), "--badget=5%: no flag"),
        (("sample", "--work", "x", "--parts", "two"), "argument --parts: invalid int value: 'two'"),
        (("sample", "--work", ""), "argument --work: empty"),  # it was the current folder
        (("sample", "--work", "x", "--method", "best"), "argument --method: invalid choice: 'best'"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_is_one_line(call, arguments, message):
    """It was told below up to 78 lines of usage, and `sampel` was a run of every step without --input."""
    code, out, error = call(*arguments)
    assert code == 2 and error.startswith(f"error: {message}") and not out, error


def test_a_name_that_is_no_utf8_is_one_line(tmp_path, call):
    """Every record was rejected as invalid UTF-8, since its source was the name, and then a traceback ended the run."""
    (tmp_path / "data").mkdir()
    write_pool(tmp_path / "data" / "\udcff.jsonl")
    for name in ("data", "data/\udcff.jsonl"):
        code, _, error = call("tag", "--work", tmp_path / "work", "--input", tmp_path / name)
        assert code == 2 and "\\udcff.jsonl: a name that is no UTF-8; rename it" in error


def test_counts_name_the_most_frequent():
    """Of many sources those that come first in the alphabet were told."""
    line = _sentence({"records": 1234, "sources": {f"s{number}": number for number in range(12)}})
    assert line.startswith("1,234 records; sources: 11 s11, 10 s10, ") and line.endswith("4 s4 and 3 more")


def cut(content: bytes) -> bytes:
    """The first half."""
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("subcommand", "name", "change"),
    [
        ("tree", "records.jsonl", lambda content: b"\xff\x00{{{\n" * 3), ("tree", "tags.jsonl", cut),
        ("tree", "tags.jsonl", lambda content: b""), ("tree", "tags.jsonl", lambda content: b"5\n5\n"),
        ("tree", "tags.jsonl", lambda content: content.replace(b'"quality"', b'"score"')),
        ("sample", "grounding.npz", cut), ("sample", "tree.npz", lambda content: b"PK\x03\x04" + content[200:]),
        ("sample", "embeddings.npy", cut), ("sample", "tree.npz", lambda content: b""),
        ("report", "rejected.jsonl", lambda content: b"\xff\xfe\n"),
        ("report", "selection.json", lambda content: b"[]"),
        ("report", "vocabulary.jsonl", cut),
    ],
)  # fmt: skip
def test_a_file_that_was_cut_or_edited_by_hand_is_one_line(tmp_path, call, worked, subcommand, name, change):
    """Such files ended in tracebacks of the JSON, NumPy or zip reader, which named no file."""
    work = tmp_path / "work"
    shutil.copytree(worked, work)
    (work / name).write_bytes(change((work / name).read_bytes()))
    code, _, error = call(subcommand, "--work", work)
    if code == 0:  # the step does not read what is wrong
        assert name in ("embeddings.npy", "selection.json", "vocabulary.jsonl")
    else:
        assert code == 2 and error.startswith("error: ") and name in error, error
