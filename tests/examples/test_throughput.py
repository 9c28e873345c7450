"""The throughput script of the 1.9B model, at a size that a CPU trains in seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from warm import run_with_forks

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "examples" / "throughput_1b9"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    (folder / "page.md").write_text("before\n<!-- throughput_1b9 -->\nold\n<!-- /throughput_1b9 -->\nafter\n")
    out = folder / "results.json"
    flags = "--tiny --lengths 64 --iterations 1".split()
    for _ in range(2):
        done = run_with_forks(FOLDER / "run.py", *flags, "--out", out, "--report", folder / "page.md")
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), (folder / "page.md").read_text(), done.stdout


def test_parts_add_up_to_the_iteration(measured):
    runs, *_ = measured
    for run in runs:
        assert sum(run["parts_ms"].values()) == pytest.approx(run["iteration_ms"])
        assert all(ms > 0 for ms in run["parts_ms"].values()), run["parts_ms"]


def test_both_models_are_counted_alike(measured):
    """4 layers, 64 tokens: one more row for 8 tokens in the layers, fewer pairs in three of them."""
    ksa, full = (next(run for run in measured[0] if run["model"] == model) for model in ("ksa", "full"))
    assert 1.0 < ksa["model_flops"] / full["model_flops"] < 1.125
    assert set(ksa["attention"]) == {"window of 16 tokens", "window of 64 tokens"}


def test_report_takes_its_place_and_nothing_is_measured_twice(measured):
    _, page, second = measured
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("| 64 | KSA |") == 2 and "==" not in second


@pytest.mark.long
def test_distillation_is_measured_against_the_plain_step(tmp_path):
    """The teacher's pass is a part of its own, and its work counts."""
    out = tmp_path / "results.json"
    command = [sys.executable, FOLDER / "run.py", "--tiny", "--lengths", "64", "--iterations", "1", "--out", out]
    done = subprocess.run([*command, "--models", "summary", "distil"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary, distil = json.loads(out.read_text())
    assert sum(distil["parts_ms"].values()) == pytest.approx(distil["iteration_ms"])
    assert all(distil["parts_ms"][f"teacher's {part}"] > 0 for part in ("attention forward", "other layers"))
    # Two thirds of the KSA model's count, and a third of the dense model's.
    assert 1.3 < distil["model_flops"] / summary["model_flops"] < 1.5
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("64 tokens: ")]
    assert "GiB by the teacher; teacher's attention forward" in line
