"""`--recompute-to-fit` in the trainer: refusals, each stage's choice, and the line of a run that is out of memory."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from test_arguments import parse
from trainer import launch

from megatron_ksa.config.fit import FitConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.recompute import CHEAP, FULL, NONE, Recompute
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.memory import MemoryReport
from megatron_ksa.cost.recompute_fit import GIB, Choice
from megatron_ksa.errors import UsageError
from megatron_ksa.failure import describe as describe_failure
from megatron_ksa.training.arguments import settings_from_args
from megatron_ksa.training.flag_rules import _check_machine
from megatron_ksa.training.recompute_fit import Fit, describe, out_of_memory_told

KSA = "--ksa --position-embedding-type rope --recompute-to-fit"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{KSA} --recompute-granularity full", "so does --recompute-granularity: drop one of them"),
        (f"{KSA} --recompute-activations", "so does --recompute-activations: drop one"),
        (f"{KSA} --recompute-method block", "so does --recompute-method: drop one"),
        (f"{KSA} --recompute-num-layers 2", "so does --recompute-num-layers: drop one"),
        (f"{KSA} --recompute-modules mlp", "so does --recompute-modules: drop one"),
        (f"{KSA} -1", "--recompute-to-fit is -1: GiB to spare, a number of at least 0"),
        (f"{KSA} nan", "--recompute-to-fit is nan"),
        (f"{KSA} --recompute-to-fit-gpu 0", "--recompute-to-fit-gpu is 0: GiB of a GPU, a number above 0"),
        (f"{KSA} --recompute-to-fit-gpu inf", "--recompute-to-fit-gpu is inf"),
        (f"{KSA[:-19]} --recompute-to-fit-gpu 80", "what --recompute-to-fit fills, which is missing: add it"),
        (f"{KSA} --cuda-graph-impl local", "--cuda-graph-impl local.*use full_iteration or none"),
        (
            f"{KSA} --decoder-first-pipeline-num-layers 1 --pipeline-model-parallel-size 2",
            "--decoder-first-pipeline-num",
        ),
        (f"{KSA} --num-experts 4", "does not go with --num-experts: .*use --recompute-granularity"),
        ("--recompute-to-fit", "a model without --ksa and --position-embedding-type harpe"),
    ],
)
def test_what_it_does_not_go_with_is_one_line(monkeypatch, flags, message):
    with pytest.raises(UsageError, match=message) as error:
        settings_from_args(parse(monkeypatch, flags))
    assert "\n" not in str(error.value)


def test_the_flag_with_and_without_a_number(monkeypatch):
    margins = [settings_from_args(parse(monkeypatch, flags)).fit.margin for flags in (KSA, f"{KSA} 2.5", KSA[:-19])]
    assert margins == [4.0, 2.5, None]


def test_a_gpu_that_is_elsewhere_needs_its_size(monkeypatch):
    with pytest.raises(UsageError, match="^--recompute-to-fit fills .*give --recompute-to-fit-gpu the GiB of one that"):
        _check_machine(parse(monkeypatch, KSA))
    _check_machine(parse(monkeypatch, f"{KSA} --recompute-to-fit-gpu 79.18"))


def test_norms_by_megatrons_flag_need_transformer_engine(monkeypatch):
    """The first step ended in a NameError: Megatron asks for an FP8 state that was not imported."""
    flags = "--ksa --position-embedding-type rope --recompute-granularity selective --recompute-modules"
    with pytest.raises(UsageError, match="^--recompute-modules layernorm .*use --recompute-to-fit"):
        _check_machine(parse(monkeypatch, f"{flags} mlp layernorm"))
    _check_machine(parse(monkeypatch, f"{flags} mlp"))


def choice(recompute: Recompute, gib: float, seconds: float = 0.0) -> Choice:
    report = MemoryReport(1, 0, 0, 0, int(gib * GIB), 0, "loss")
    return Choice(recompute, report, seconds, 1.0)


def test_stages_with_the_same_choice_are_one_line():
    some = Recompute(3, cheap=CHEAP)
    said = describe([choice(FULL, 70, 1), choice(some, 71, 0.3), choice(some, 74.75, 0.2)], 79.18 * GIB, 4.0)
    assert said.splitlines() == [
        "recompute to fit (stage 0): every layer; predicted peak 70.00 GiB of 79.18, with 4 to spare; 33.3% more time "
        "in the layers",
        "recompute to fit (stages 1 to 2): the first 3 layers and norms, heads, activation of the other layers; "
        "predicted peak 74.75 GiB of 79.18, with 4 to spare; 10.0% more time in the layers",
    ]
    said = describe([choice(NONE, 55.5)], 79.18 * GIB, 0.0)
    assert said.startswith("recompute to fit: nothing; predicted peak 55.50 GiB of 79.18, with 0 to spare; 0.0% more")


def failed(args: argparse.Namespace, fit: Fit | None) -> str:
    """The line of a run that is out of memory."""
    with pytest.raises(torch.OutOfMemoryError) as error, out_of_memory_told(args, fit):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
    return describe_failure(error.value)


def test_out_of_memory_ends_with_what_to_set(monkeypatch):
    args = SimpleNamespace(recompute_granularity=None)
    assert failed(args, None).endswith("2.00 GiB.; --recompute-to-fit chooses what to recompute")
    args.recompute_granularity = "selective"
    assert failed(args, None).endswith(
        "--recompute-to-fit in place of --recompute-granularity chooses what to recompute"
    )
    fit = Fit(args, RunSettings(None, None, fit=FitConfig(4.0)), choice(NONE, 74.0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(75.2 * GIB))
    said = failed(args, fit)
    assert (
        said.endswith("74.00 GiB were predicted with nothing recomputed: set --recompute-to-fit 7.5")
        and "\n" not in said
    )
    fit.choice = choice(FULL, 74.0)
    assert "use more GPUs" in failed(args, fit)


@pytest.mark.parametrize(
    ("ksa", "blends"),
    [
        ({}, False), ({"anneal_start": 1, "anneal_end": 9}, True), ({"initial_coefficient": 0.5}, True),
        ({"initial_coefficient": 1.0}, False), ({"initial_coefficient": 0.0, "layer_pattern": "f"}, False),
        ({"initial_coefficient": 0.0, "independent_projections": False}, False),
    ],
)  # fmt: skip
def test_blended_heads_are_not_rotated_again(ksa, blends):
    """The rotation keeps the projection only where it normalises it, and a blend comes after the norms."""
    assert KSAConfig(enabled=True, **ksa).blends == blends


@pytest.mark.slow
def test_each_stage_recomputes_what_fits_and_the_losses_stay(tmp_path):
    """Two stages with room for one of them: the other recomputes, and training goes the same way.

    With `--overlap-grad-reduce` it ended in an assertion: a weight whose tensors are computed again had no gradient.
    """
    from megatron_ksa.cost.memory import stage_memory
    from megatron_ksa.cost.shapes import ModelShape, TrainingLayout

    ksa = KSAConfig(enabled=True, layer_pattern="kwlf", window_chunks="2")
    shape = ModelShape(ksa, 4, 32, 64, 4, 2, 8, 128, qk_norm=True, angles_per_head=True)
    path = dict(parameter_bytes=4, fused_norm=False, fused_swiglu=False, fused_attention=False)
    plan = TrainingLayout(64, pipeline_parallel=2, num_micro_batches=4, distributed_optimizer=False, **path)
    totals = [stage_memory(shape, plan, stage).total for stage in range(2)]
    (tmp_path / "gpu_bytes").write_text(str(max(totals) - 1))
    pipeline = "--pipeline-model-parallel-size 2 --train-iters 2 --overlap-grad-reduce"
    runs = [(tmp_path / f"{name}.json", f"{pipeline} {flags}") for name, flags in
            (("plain", ""), ("fit", "--recompute-to-fit 0"))]  # fmt: skip
    done = launch(runs, 2, entry="fitted_pretrain.py")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("recompute to fit (stage ")]
    nothing = [": nothing; " in line for line in lines]
    assert sorted(nothing) == [False, True] and nothing[totals.index(min(totals))]
    assert any("norms" in line for line in lines), lines
    plain, fit = (json.loads(record.read_text()) for record, _ in runs)
    assert plain == fit
