"""Layouts of several ranks against one process (see `nccl_check.py`, which also runs by itself)."""

import json
import subprocess
import sys
from pathlib import Path

import nccl_check
import pytest
import torch
from nccl_layouts import LAYOUTS

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
LOSS = {"loss": 2.0, "grad_norm": 1.0}


def check(processes: int, *flags: str) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("nccl_check.py")
    command = [sys.executable, script, "--processes", str(processes), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", LAYOUTS)
def test_several_gpus_train_as_one(processes):
    if processes > GPUS:
        pytest.skip(f"needs {processes} GPUs")
    done = check(processes)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.mark.long
def test_eight_ranks_train_as_one():
    """Every layout of eight ranks, over gloo."""
    if GPUS:
        pytest.skip("there are GPUs: test_several_gpus_train_as_one")
    done = check(8, "--limit", "400")
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


def test_a_layout_that_hangs_is_named_and_those_after_it_go_on(tmp_path, monkeypatch):
    """A hang ended the whole check of a set of ranks: the layouts after it must run in a new set."""
    launches = []

    def train(folder, runs, processes, limit, seconds):
        """The second layout of the first set of four ranks does not end."""
        launches.append((processes, len(runs)))
        first = processes == 4 and len(launches) == 2
        complete = 1 if first else len(runs)
        for record, _ in runs[:complete]:
            record.write_text(json.dumps({1: LOSS}))
        return complete, "no end within 50 s" if first else "", False

    monkeypatch.setattr(nccl_check, "train", train)
    names = ["TP 2 x CP 2", "PP 2 x CP 2", "CP 4, all-to-all"]
    told = []
    checked = nccl_check.Check(tmp_path, 4, 50, lambda results: told.append(dict(results)))
    checked.run({name: LAYOUTS[4][name] for name in names})
    # A checkpoint and a run of one process; three layouts, of which one trains; the one that is left.
    assert launches == [(1, 2), (4, 3), (4, 1)]
    assert [checked.results[name]["agrees"] for name in names] == [True, False, True]
    assert checked.results["PP 2 x CP 2"]["failed"] == "no end within 50 s"
    assert [len(results) for results in told] == [2, 3]


def test_flags_that_the_trainer_refuses_are_skipped(tmp_path, monkeypatch):
    """Layers that another version takes are no failure of a layout."""
    name = "CP 4, Transformer Engine, FP8"

    def train(folder, runs, processes, limit, seconds):
        runs[0][0].write_text(json.dumps({1: LOSS}))
        return 1, "error: --fp8-format hybrid: no", True

    monkeypatch.setattr(nccl_check, "train", train)
    checked = nccl_check.Check(tmp_path, 4, 50, lambda results: None)
    checked.run({name: LAYOUTS[4][name]})
    assert checked.results[name]["skipped"] == "single process: error: --fp8-format hybrid: no"


def test_results_of_a_set_whose_time_is_over_are_kept(tmp_path, monkeypatch):
    """A set that was ended lost what its first layouts had trained."""

    def train(folder, runs, processes, limit, seconds):
        complete = 1 if processes == 4 else len(runs)
        for record, _ in runs[:complete]:
            record.write_text(json.dumps({1: LOSS}))
        return complete, nccl_check.TIME_IS_OVER if processes == 4 else "", False

    monkeypatch.setattr(nccl_check, "train", train)
    names = ["TP 2 x CP 2", "PP 2 x CP 2", "CP 4, all-to-all"]
    checked = nccl_check.Check(tmp_path, 4, 50, lambda results: None, 100)
    checked.run({name: LAYOUTS[4][name] for name in names})
    assert [checked.results[name]["agrees"] for name in names] == [True, False, False]
    assert "failed" in checked.results[names[2]]


def test_bf16_must_agree_at_the_first_step(tmp_path):
    """The limit of later steps, which Adam's signs need, let a fault of 1 % at the first one pass."""
    checked = nccl_check.Check(tmp_path, 8, 50, lambda results: None)
    name = "CP 8, distributed optimizer, bf16"
    for first, later, agrees in ((1.001, 1.009, True), (1.009, 1.001, False), (1.001, 1.02, False)):
        trained = {1: {"loss": 2.0, "grad_norm": first}, 2: {"loss": 2.0, "grad_norm": later}}
        checked._compare(name, LAYOUTS[8][name], trained, {1: LOSS, 2: LOSS})
        assert checked.results[name]["agrees"] == agrees
    assert {layout.allowed_first for layout in LAYOUTS[8].values()} == {1e-5, 2e-3, 2e-2}


def test_layouts_by_what_they_need():
    batches = nccl_check.batches(LAYOUTS[4])
    assert [len(layouts) for layouts in batches.values()] == [10, 3, 3]
    assert all(layout.allowed == 2e-2 for layout in batches["fp8"].values())
