"""The planner's bytes of a step against those that the trainer's ranks send, as the kernel counts them."""

import json

import pytest
from trainer import launch
from wire import counts_sent_bytes

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.recompute import FULL
from megatron_ksa.cost.cluster_plan import bytes_on_the_wire
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout

pytestmark = pytest.mark.slow
STEPS, MICRO_BATCHES = 2, 2
SIZE = "--hidden-size 128 --ffn-hidden-size 256 --kv-channels 32 --seq-length 256 --max-position-embeddings 256"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TP, CP = "--tensor-model-parallel-size 2 --sequence-parallel", "--context-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer"
# The layout of trainer.MODEL, its flags, and the kinds of parallelism that send.
LAYOUTS = {
    TP: ({"tensor_parallel": 2, "sequence_parallel": True}, "tensor"),
    f"{TP} {RECOMPUTE}": ({"tensor_parallel": 2, "sequence_parallel": True, "recompute": FULL}, "tensor"),
    PP: ({"pipeline_parallel": 2}, "pipeline"),
    f"{CP} {OPTIMIZER}": ({"context_parallel": 2}, "context data"),
    f"{CP} {OPTIMIZER} {RECOMPUTE}": ({"context_parallel": 2, "recompute": FULL}, "context data"),
    OPTIMIZER: ({"data_parallel": 2}, "data"),
}


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> dict[str, list[int]]:
    """Bytes that each rank sends in the last step of each layout."""
    folder = tmp_path_factory.mktemp("wire")
    train = f"--train-iters {STEPS} --global-batch-size {MICRO_BATCHES} {SIZE}"
    runs = [(folder / f"{number}.json", f"{train} {flags}") for number, flags in enumerate(LAYOUTS)]
    done = launch(runs, 2, entry="counted_pretrain.py")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [json.loads((folder / f"sent{rank}.json").read_text()) for rank in range(2)]
    ends = range(STEPS - 1, STEPS * len(LAYOUTS), STEPS)
    return {flags: [one[end] - one[end - 1] for one in counts] for flags, end in zip(LAYOUTS, ends, strict=True)}


@pytest.mark.skipif(not counts_sent_bytes(), reason="TCP_INFO of this kernel does not count sent bytes")
@pytest.mark.parametrize("flags", LAYOUTS)
def test_a_step_sends_what_the_planner_says(sent, flags):
    changes, kinds = LAYOUTS[flags]
    ksa = KSAConfig(enabled=True, layer_pattern="kwlf", window_chunks="2")
    shape = ModelShape(ksa, 4, 128, 256, 4, 2, 32, 128, qk_norm=True, angles_per_head=True)
    layout = TrainingLayout(
        256, num_micro_batches=MICRO_BATCHES // changes.get("data_parallel", 1), parameter_bytes=4, **changes
    )
    planned = bytes_on_the_wire(shape, layout)
    assert {kind for kind, number in planned.items() if number} == set(kinds.split())
    # Beside it go gloo's headers, the batch to tensor-parallel ranks, the loss's maxima and sums, norms and logs.
    assert sum(planned.values()) <= max(sent[flags]) <= 1.02 * sum(planned.values())
