"""`preprocess_tags.py sample`, `write` and `report`: alone, again, and refused in one line."""

import pytest
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
    assert "stands" not in call("sample", "--work", work, "--budget", "10%", *tokenizer)[1]
    assert "stands" not in call("write", "--work", work, *steps[1][1])[1]


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
    assert set(path.name for path in work.iterdir()) - set(before) <= {".digests.json"}
