"""The throughput script of the 1.9B model, at a size that a CPU trains in seconds."""

import importlib.util
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


def test_report_compares_runs_of_one_machine_and_kind():
    """KSA's ratios are of the run with the same layers, commit and graphs; columns without meaning are left out."""

    def run(model, kind, speed, commit="0123", **more):
        machine = {"gpu": "G", "torch": "2", "triton": "3", "commit": commit}
        common = {"length": 8192, "peak_gib": 1.0, "mfu": None, "recompute": None, "attention": {}, "parts_ms": {}}
        return common | {"model": model, "kind": kind, "tokens_per_second": speed, "machine": machine} | more

    runs = [run("full", "local", 100.0), run("ksa", "local", 120.0), run("ksa", "te", 150.0)]
    spec = importlib.util.spec_from_file_location("throughput_report", FOLDER / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    lines = report.tables(runs).splitlines()
    head, local, _, te = lines[2], *lines[4:7]
    assert head == "| text tokens | attention | layers | tokens/s | KSA / full | / te | peak GiB | MFU |"
    assert local == "| 8,192 | KSA | local | 120 | 1.20 | 0.80 | 1.0 |  |"
    assert te == "| 8,192 | KSA | te | 150 |  | 1.00 | 1.0 |  |"
    other = [run("full", "local", 100.0, commit="4567"), run("ksa", "local", 120.0)]
    assert "KSA / full" not in report.tables(other) and "0123 (8,192 tokens), 4567" in report.tables(other)
