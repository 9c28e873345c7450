"""Which layers a run has where both kinds are installed."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ksa.training import layer_choice
from megatron_ksa.training.given import GIVEN
from megatron_ksa.training.layer_choice import LOCAL, MEASURED, TE, choose_layers

RESULTS = Path(__file__).parents[2] / "examples" / "throughput_1b9"


def arguments(**changes):
    none = dict.fromkeys(("fp8", "num_experts", "symmetric_ar_type", "load", "pretrained_checkpoint"))
    off = dict.fromkeys(("tp_comm_overlap", "use_transformer_engine_op_fuser", "finetune"), False)
    return argparse.Namespace(**{"transformer_impl": TE, "cuda_graph_impl": "none", **none, **off, **changes})


@pytest.mark.parametrize(("measured", "chosen"), [((2, 1), LOCAL), ((1, 2), TE)])
def test_the_faster_ones_are_taken_and_named(measured, chosen, monkeypatch):
    """Where it was installed, Transformer Engine was the default and the slower kind."""
    numbers = dict(zip((LOCAL, TE), measured, strict=True))
    monkeypatch.setattr(layer_choice, "MEASURED", {True: {LOCAL: 7, TE: 8}, False: numbers})
    args, graphs = arguments(), arguments(cuda_graph_impl="full_iteration")
    line = choose_layers(args, None)
    assert args.transformer_impl == chosen and "2 tokens/s against 1 of" in line and "\n" not in line
    assert "8 tokens/s against 7 of local in CUDA graphs" in choose_layers(graphs, None)


def test_a_flag_decides_and_so_does_what_only_one_kind_has():
    given = arguments(**{GIVEN: {"transformer_impl": ("--transformer-impl",)}})
    assert choose_layers(given, None) is None and given.transformer_impl == TE
    missing = arguments(transformer_impl=LOCAL)
    assert choose_layers(missing, None) is None and missing.transformer_impl == LOCAL
    args = arguments(fp8="hybrid")
    assert "because of --fp8-format" in choose_layers(args, None) and args.transformer_impl == TE


@pytest.mark.parametrize("kept", [LOCAL, TE])
def test_a_run_that_goes_on_keeps_its_layers(kept, monkeypatch):
    """Another kind rounds elsewhere: a resumed run would leave the uninterrupted one."""
    numbers = {LOCAL: 1, TE: 2} if kept == LOCAL else {LOCAL: 2, TE: 1}
    monkeypatch.setattr(layer_choice, "MEASURED", {False: numbers})
    stored = SimpleNamespace(args=argparse.Namespace(transformer_impl=kept))
    monkeypatch.setattr(layer_choice, "only_weights", lambda args: args.finetune)
    args, started = arguments(), arguments(finetune=True)
    assert "as the checkpoint's" in choose_layers(args, stored) and args.transformer_impl == kept
    assert "tokens/s against" in choose_layers(started, stored) and started.transformer_impl != kept


@pytest.mark.parametrize(("in_graphs", "file"), [(False, "results_kinds_h100"), (True, "results_kinds_graphs_h100")])
def test_the_numbers_are_those_of_the_committed_measurement(in_graphs, file):
    runs = {run["kind"]: run for run in json.loads((RESULTS / f"{file}.json").read_text()) if run["model"] == "ksa"}
    for kind, name in ((LOCAL, "local"), (TE, "te")):
        run = runs[name + "+graph" * in_graphs]
        assert MEASURED[in_graphs][kind] == round(run["tokens_per_second"])
        assert layer_choice.GPU in run["machine"]["gpu"] and run["length"] == 8192
