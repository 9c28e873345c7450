"""Mixtures of experts (`--num-experts`) next to KSA attention: every layout trains as one process does."""

import pytest
from trainer import assert_same, launch, steps

pytestmark = pytest.mark.slow
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0 --train-iters 3 "
    "--global-batch-size 2"
)
TOLERANCE = 1e-5
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = [
    (2, "--expert-model-parallel-size 2"),
    (2, f"{TP} --loss-chunk-rows 20"),
    (2, f"{TP} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    (2, "--context-parallel-size 2 --expert-model-parallel-size 2"),
    (2, "--pipeline-model-parallel-size 2"),
    # Experts divided among ranks, and each of them as well: parts of different sizes.
    (4, f"{TP} --expert-model-parallel-size 2"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the layouts' records, the record of one process, all from one checkpoint; output by processes."""
    folder = tmp_path_factory.mktemp("experts")
    start = f"{EXPERTS} --load {folder}/saved --ckpt-step 1 --finetune"
    one = folder / "one.json"
    launch([(folder / "start.json", f"{EXPERTS} --save {folder}/saved --save-interval 1"), (one, start)], 1)
    done = {}
    for size in {size for size, _ in LAYOUTS}:
        same_size = [(number, layout) for number, (processes, layout) in enumerate(LAYOUTS) if processes == size]
        done[size] = launch([(folder / f"{number}.json", f"{start} {layout}") for number, layout in same_size], size)
    return folder, steps(one), done


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_process(layout, runs):
    folder, one, done = runs
    record = folder / f"{LAYOUTS.index(layout)}.json"
    assert record.exists(), done[layout[0]].stderr[-3000:]
    assert_same(steps(record), one, range(1, 4), TOLERANCE)
