"""The demo: trains, resumes from its checkpoint, and says the same again when there is nothing left to do."""

import json
import re
from pathlib import Path

import pytest
from warm import run_script, run_with_forks

pytestmark = pytest.mark.slow
DEMO = Path("examples/demo/run.py")
# An eighth of the text, one sequence a rank.
SMALL = ("--one-file-in", 8, "--global-batch-size", 2, "--evaluation-sequences", 2)


def demo(output: Path, *arguments: object) -> str:
    """What the demo prints. It runs in a fork, and so do the commands that it calls, in place of new processes."""
    done = run_with_forks(DEMO, "--output", output, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_demo_trains_resumes_and_does_not_repeat_itself(tmp_path):
    first = demo(tmp_path, "--steps", 2, *SMALL)
    assert (
        "preprocess_tags.py" in first
        and "preprocess_data.py" in first
        and "successfully saved checkpoint from iteration       2" in first
    )
    second = demo(tmp_path, "--steps", 3, *SMALL)
    assert "preprocess_tags.py" not in second and "preprocess_data.py" not in second
    selected = json.loads((tmp_path / "data/tags/report/summary.json").read_text())["selection"]
    assert 0.55 < selected["instances"] / selected["pool_instances"] < 0.65
    assert "iteration        3/       3" in second and "iteration        2/       3" not in second
    third = demo(tmp_path, "--steps", 3, *SMALL)
    assert "pretrain_gpt.py" not in third and "already trained for 3 iterations" in third
    loss, iterations, unigram = re.search(
        r"validation loss ([\d.]+) .* after (\d+) iterations.*: ([\d.]+)", third
    ).groups()
    assert int(iterations) == 3 and 0 < float(unigram) < float(loss)  # three steps learn nothing yet
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())


def test_fresh_removes_only_a_folder_of_the_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable", encoding="utf-8")
    done = run_script(DEMO, "--output", tmp_path, "--fresh")
    assert done.returncode == 2 and "not a folder of this demo" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
