"""The measurement of decoding and prompts, with a small model on a CPU."""

import json
import sys

import pytest
from run_tool import ROOT, refusal, run_tool


@pytest.fixture(autouse=True)
def its_report(monkeypatch):
    """Several folders of examples have a report.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "generation_speed"))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    yield
    sys.modules.pop("report", None)


def test_every_cell_is_measured_once(tmp_path):
    flags = ("--out", tmp_path, "--tiny", "--lengths", 64, "--batches", 1, 0)
    done = run_tool("examples/generation_speed/run.py", *flags)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["model"], run["kind"], run["batch"]) for run in runs] == [
        (model, kind, batch)
        for model in ("hybrid", "full")
        for kind, batch in (("step", 1), ("step", 1), ("step", 0), ("prompt", 1))
    ]
    assert all(run.get("ms", run.get("seconds")) > 0 for run in runs)
    hybrid, full = (next(run["state_bytes"] for run in runs if run["model"] == model) for model in ("hybrid", "full"))
    assert hybrid < full
    again = run_tool("examples/generation_speed/run.py", *flags)
    assert "'ms'" not in again.stdout and (tmp_path / "results.md").read_text() in again.stdout
    assert "| 64 | 3 | yes |" in again.stdout


def test_bad_input(tmp_path):
    assert "--lengths" in refusal(run_tool("examples/generation_speed/run.py", "--out", tmp_path, "--lengths", -1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"runs": [', "cannot be read as JSON"),
        ('{"header": {"model": "Qwen3-4B"}, "runs": []}', "model Qwen3-4B, now tiny"),
        ('{"header": {"commit": "0000000"}, "runs": []}', "commit 0000000, now 1111111"),
    ],
)
def test_results_of_another_run(content, message, tmp_path):
    """A small model's cells counted as the large one's; an older commit's times stood under the newer one's name."""
    (tmp_path / "results.json").write_text(content)
    done = run_tool("examples/generation_speed/run.py", "--out", tmp_path, "--tiny", "--commit", "1111111")
    assert message in refusal(done)
    assert (tmp_path / "results.json").read_text() == content
