"""`preprocess_tags.py sample`, `write` and `report`: alone, again, and refused in one line."""

import pytest
from raw_pool import write_pool
from work_folder import make_work_folder


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
    assert "that of an earlier run is forgotten" in call("tag", *flags)[1]
    assert "target, " not in call("tree", "--work", tmp_path / "work")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--budget", "61"), "error: --budget 61: the pool has 60 instances"),
        (("sample", "--budget", "1kt"), "error: --budget 1kt: tokens can be counted only with --tokenizer-model"),
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
