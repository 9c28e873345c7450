"""Passes before the first step, in the trainer: a run with them trains to the numbers of one without."""

import pytest
from trainer import launch, selected, steps

pytestmark = pytest.mark.slow

DROPOUT = "--hidden-dropout 0.1"
LAYOUTS = [
    # Its dropout takes random numbers of Megatron's tracker.
    f"--tensor-model-parallel-size 2 --sequence-parallel {DROPOUT}",
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --ksa-log-attention-share "
    "--rerun-mode validate_results",
    # A pass changes the biases of experts, which no gradient does.
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --num-experts 4 --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --moe-router-enable-expert-bias "
    f"--moe-router-score-function sigmoid {DROPOUT}",
]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """The outcome of the runs on two ranks, and each layout's records without and with passes."""
    folder = tmp_path_factory.mktemp("passes")
    layouts = selected(request, "layout")
    runs = [
        (folder / f"{number}{passes}.json", f"--train-iters 3 {layout}")
        for number, layout in enumerate(layouts)
        for passes in ("", "passes")
    ]
    done = launch(runs, 2, entry="passes_pretrain.py")
    return done, {layout: [record for record, flags in runs if flags.endswith(layout)] for layout in layouts}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline", "experts"])
def test_passes_leave_no_trace(layout, trained):
    done, records = trained
    plain, passes = records[layout]
    assert passes.exists(), done.stderr[-6000:]
    assert steps(passes) == steps(plain) and len(steps(plain)) == 3
    assert done.stdout.count("scales come from 2 passes") == len(records)
