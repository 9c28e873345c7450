"""The GPU checks' kinds, as far as a machine without a GPU can tell."""

import json
import math
import sys
from types import SimpleNamespace

import gpu_check
import pytest
from megatron.training import arguments as megatron_arguments
from trainer import MODEL, TRAINING

from megatron_ksa.model import prepare
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import install_arguments, settings_from_args


@pytest.mark.parametrize("name", gpu_check.KINDS)
def test_every_kind_has_flags_that_are_accepted(name, monkeypatch):
    """A kind that the flags' checks refuse would be found on a GPU only."""
    kind = gpu_check.KINDS[name]
    assert kind.like is None or gpu_check.KINDS[kind.like].ranks <= kind.ranks
    monkeypatch.setenv("WORLD_SIZE", str(kind.ranks))
    monkeypatch.setattr(prepare, "REFUSES_UNCHECKED", False)
    for flags in (kind.flags, kind.first, kind.start):
        if flags is None:
            continue
        words = [*MODEL, *TRAINING, "--mock-data", *gpu_check.COMMON.split(), *kind.precision.split(), *flags.split()]
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        with install_arguments(trainer_defaults()):
            args = megatron_arguments.parse_args()
        settings_from_args(args)


def test_groups_hold_every_kind_once_and_what_it_is_compared_with():
    names = gpu_check.with_compared(["te_fp8_delayed_full_iteration", "cp2_full_iteration"])
    assert set(names) == {"kernels", "te", "te_fp8_delayed", "te_fp8_delayed_full_iteration", "cp2",
                          "cp2_full_iteration"}  # fmt: skip
    groups = gpu_check.groups(names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert ["te_fp8_delayed_full_iteration"] in groups and ["kernels", "te", "te_fp8_delayed"] in groups
    # Graphs of iterations share processes with their like alone, graphs of layers with none.
    apart = gpu_check.groups(["kernels", "full_iteration", "local", "anneal_full_iteration", "te_full_iteration"])
    assert apart == [["kernels"], ["full_iteration", "anneal_full_iteration"], ["local"], ["te_full_iteration"]]


def test_a_kind_agrees_where_its_deviation_is_within_the_limit():
    run = {step: {"loss": 6.0, "grad_norm": 1.0} for step in range(1, 9)}
    far = {step: {"loss": 6.0 * 1.02, "grad_norm": 1.0} for step in range(1, 9)}
    assert gpu_check.compare("te", {"te": run, "kernels": run})["agrees"]
    assert not gpu_check.compare("te_fp8_delayed", {"te_fp8_delayed": far, "te": run})["agrees"]
    failed = gpu_check.compare("te", {"te": run, "kernels": "error: no GPU"})
    assert not failed["agrees"] and "no GPU" in failed["failed"]
    assert not gpu_check.compare("te", {"te": "error: no GPU", "kernels": run})["agrees"]


def test_fp8_has_the_first_gradient_of_16_bits():
    """Delayed scaling's first gradient norm was a fifth of that in 16 bits, and no loss of eight steps showed it."""
    norms = dict.fromkeys(range(1, 9), 1.0)
    run, lost, lost_later = (
        {step: {"loss": 6.0, "grad_norm": norm} for step, norm in (norms | low).items()}
        for low in ({}, {1: 0.2}, {5: 0.2})
    )
    found = gpu_check.compare("te_fp8_delayed", {"te_fp8_delayed": lost, "te": run})
    assert not found["agrees"] and found["deviations"]["first_grad_norm"] == pytest.approx(0.8)
    assert gpu_check.compare("te_fp8_delayed", {"te_fp8_delayed": lost_later, "te": run})["agrees"]
    assert not gpu_check.compare("te_to_fp8", {"te_to_fp8": lost_later, "te": run})["agrees"]


def test_distillation_begins_with_a_dense_model(tmp_path):
    """It was refused for want of a checkpoint, on a GPU only."""
    (first, begin), (record, own) = gpu_check.runs_of(tmp_path, "te_distil")
    assert (first.name, record.name) == ("te_distil.start.json", "te_distil.json")
    saved = f"{tmp_path}/te_distil"
    assert "--no-ksa" in begin and begin.endswith(f"--save {saved} --save-interval 1")
    assert "--ksa-distill" in own and own.endswith(f"--load {saved} --finetune")


def test_a_kind_that_fails_behind_others_gets_processes_of_its_own(monkeypatch, tmp_path):
    """What a run leaves in its process may be what fails the next one; a kind that fails first has failed."""
    launched = []

    def launch(runs, ranks, limit, seconds):
        launched.append([record.stem for record, _ in runs])
        for number, (record, _) in enumerate(runs):
            if record.stem == "reference" or (record.stem == "anneal" and number):
                break
            record.write_text(json.dumps({step: {"loss": 1.0, "grad_norm": 1.0} for step in range(1, 9)}))
        return SimpleNamespace(stderr="error: it failed")

    monkeypatch.setattr(gpu_check, "launch", launch)
    done = gpu_check.train(tmp_path / "0", ["kernels", "anneal", "reference", "shared"], 120, math.inf)
    assert launched == [["kernels", "anneal", "reference", "shared"], ["anneal", "reference", "shared"],
                        ["reference", "shared"], ["shared"]]  # fmt: skip
    assert done["reference"] == "error: it failed" and all(len(done[name]) == 8 for name in ("kernels", "anneal"))
