"""Mixtures of experts (`--num-experts`) next to KSA attention: every layout trains as one process does."""

import pytest
from trainer import assert_same, launch, steps

EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0 --train-iters 3"
)
TOLERANCE = 1e-5
LAYOUTS = [
    "--expert-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel --loss-chunk-rows 20",
    "--context-parallel-size 2 --expert-model-parallel-size 2",
    "--pipeline-model-parallel-size 2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the layouts' records, the record of one process, all from one checkpoint, and the layouts' output."""
    folder = tmp_path_factory.mktemp("experts")
    start = f"{EXPERTS} --load {folder}/saved --ckpt-step 1 --finetune"
    one = folder / "one.json"
    launch([(folder / "start.json", f"{EXPERTS} --save {folder}/saved --save-interval 1"), (one, start)], 1)
    done = launch([(folder / f"{number}.json", f"{start} {layout}") for number, layout in enumerate(LAYOUTS)], 2)
    return folder, steps(one), done


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_process(layout, runs):
    folder, one, done = runs
    record = folder / f"{LAYOUTS.index(layout)}.json"
    assert record.exists(), done.stderr[-3000:]
    assert_same(steps(record), one, range(1, 4), TOLERANCE)
