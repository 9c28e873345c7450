"""The experiment on summaries: its stages, its tables, and needles at a distance."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from run_tool import run_tool

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ksa_evidence"


def module(path: Path):
    """A script of the examples as a module; several folders have a report.py."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    yield module(EXAMPLE / "experiment.py")
    sys.modules.pop("report", None)


def test_arms_from_dense_have_the_same_tokens_at_every_score(experiment):
    steps = dict(steps=9, dense_steps=30, distil_steps=10, extend_steps=5)
    args = argparse.Namespace(lr=1.0, dense_lr=0.1, arms=["full"], **steps)
    stages = experiment.dense_stages(args)

    def tokens(stage) -> int:
        return stage.steps + (tokens(stage.parent) if stage.parent else 0)

    for name in ("trained", "extended"):
        assert len({tokens(stage) for stage in stages if stage.name == name}) == 1
    assert {stage.arm for stage in stages if stage.name == "trained"} == set(experiment.DENSE)
    folders = [stage.folder(Path("work"), 0) for stage in stages]
    assert len(set(folders)) == len(folders)
    (annealed,) = (s for s in stages if s.arm == experiment.DISTILLED and s.name == "trained")
    assert annealed.flags == ("--ksa-anneal-start", "0", "--ksa-anneal-end", "15") and annealed.steps == 20


def test_speed_of_every_arm(tmp_path, experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "experiment", experiment)
    done = run_tool("examples/ksa_evidence/speed.py", "--output", tmp_path / "speed.json", "--lengths", 64,
                       "--batch-tokens", 128, "--heads", 2, "--vocabulary", 64, "--passes", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "speed.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["full", "3:1 window", "3:1 KSA", "window", "KSA"]
    assert all(run["tokens_per_second"] == pytest.approx(128 / run["ms"] * 1e3) for run in runs)


def test_tables_and_chart(tmp_path):
    report = module(EXAMPLE / "report.py")

    def run(arm: str, seed: int, found: float) -> dict:
        rows = [
            {"form": "single_2", "length": 1000, "depth": 1 - far / 1000, "values": value}
            for far, value in ((64, 1.0), (500, found))
        ]
        return {
            "part": "scratch", "arm": arm, "stage": "trained", "seed": seed, "length": 1000, "kv_rows": 500,
            "needles": rows,
            "perplexity": [{"length": 256, "loss": 0.0}],
        }  # fmt: skip

    keys = ("layers", "heads", "chunk", "summaries", "window", "length", "steps", "batch_tokens", "lr", "dense_steps",
            "distil_steps", "extend_steps")  # fmt: skip
    machine = dict.fromkeys(("device", "torch", "triton", "commit"), "abacus")
    runs = [run("KSA", seed, 0.8 + 0.1 * seed) for seed in (0, 1)] + [run("window", 0, 0.0)]
    results = {"settings": dict.fromkeys(keys, 8), "machine": machine, "runs": runs}
    text = report.text_of(results)
    assert "| arm | 64 (window) | 500 |" in text
    assert "| KSA | 100.0 ± 0.0 | 85.0 ± 5.0 |" in text and "| window | 100.0 ± 0.0 | 0.0 ± 0.0 |" in text
    assert text.index("| window |") < text.index("| KSA |")
    report.plot(results, tmp_path / "needles.png")
    assert (tmp_path / "needles.png").stat().st_size > 1000


@pytest.mark.parametrize(("distances", "expected"), [([100, 250, 2000], [0.9, 0.75]), (None, [0.0, 0.5, 1.0])])
def test_needles_at_a_distance(distances, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "evaluate"))
    needle = module(ROOT / "examples" / "evaluate" / "needle.py")
    args = argparse.Namespace(distances=distances, depths=3)
    assert needle.depths_at(1000, args) == expected


@pytest.mark.parametrize("example", ["ksa_evidence", "harpe_extend"])
def test_an_experiment_writes_its_report_beside_its_results(example, tmp_path):
    """Both experiments ended at their first measurement: their results.md had no section to write tables into."""
    report = module(ROOT / "examples" / example / "report.py")
    published = sorted((ROOT / "examples" / example).glob("results*.json"))
    for number, results in enumerate(published):
        (tmp_path / f"{number}.json").write_bytes(results.read_bytes())
        text = report.write_beside(tmp_path / f"{number}.json")
        assert "| arm |" in text and (tmp_path / f"{number}.md").read_text().strip() == text.strip()
    assert published and list(tmp_path.glob("*.png"))
