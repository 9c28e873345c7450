"""The scripts that measure the 1.9B model's memory, at a size that a CPU trains in seconds."""

import json
from pathlib import Path

import pytest
from warm import Done, run_with_forks

ROOT = Path(__file__).parents[2]
SECTIONS = ("memory_1b9", "memory_1b9_throughput", "recompute_to_fit_1b9")


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in SECTIONS))
    return path


def run(script: str, *arguments: object) -> Done:
    return run_with_forks(f"examples/memory_1b9/{script}", *arguments)


@pytest.mark.slow
def test_saved_tensors_are_the_predicted_ones(tmp_path, page):
    """What lives before the loss; on a CPU the fullest moment has the temporaries of the reference besides."""
    out = tmp_path / "results.json"
    cases = ["64:none", "64:mlp", "128:2", "128:1+norms+activation", "128:full", "128:fit"]
    done = run(
        "run.py", "--tiny", "--lengths", 64, 128, "--iterations", 1, "--cases", *cases, "--out", out, "--report", page
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (measured,) = json.loads(out.read_text())
    assert [case["fit"] for case in measured["cases"]] == [False] * 5 + [True]
    for case in measured["cases"]:
        assert case["bytes"]["saved"] == pytest.approx(case["predicted"]["activations"], rel=0.02), case["what"]
        assert case["peak"] >= case["bytes"]["state"] + case["bytes"]["saved"]
    losses = {case["losses"][0] for case in measured["cases"] if case["length"] == 128}
    assert len(losses) == 4, "each step trains on from the one before"
    assert "(what fits)" in page.read_text() and page.read_text().count("old") == 2


def test_predictions_of_measured_runs_are_within_five_percent(page):
    """Also those of commits whose code saved a little more."""
    results = sorted((ROOT / "examples" / "throughput_1b9").glob("results_*.json"))
    done = run("compare.py", page, *results)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in page.read_text().splitlines() if " %" in line]
    assert len(rows) > 10
    assert max(abs(float(row[8].removesuffix(" %"))) for row in rows) < 5


def test_choices_are_written(page):
    done = run("fit.py", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "| 8,192 | 1 | nothing |" in text and "With Megatron's own recompute alone" in text


def test_bad_input_is_one_line(tmp_path):
    for script, *arguments in (
        ("run.py", "--tiny", "--cases", "64:some", "--out", tmp_path / "out.json"),
        ("run.py", "--tiny", "--report", tmp_path / "none.md"),
        ("compare.py", tmp_path / "none.md", tmp_path / "none.json"),
        ("fit.py", tmp_path / "none.md"),
    ):
        done = run(script, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
