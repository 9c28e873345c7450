"""State of the distributed optimizer in a checkpoint for any layout: what it saves of each parameter."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from single_process import build_model, process_groups, transformer_config

from megatron_ksa.config.ksa import KSAConfig


@pytest.mark.parametrize("bucket_size", [1, 3000, None])
def test_each_parameter_is_saved_as_itself(bucket_size):
    """With `--overlap-grad-reduce`, which makes several buckets, parameters and moments were saved shifted.

    Resumed runs trained on from those without an error: their gradient norms were up to 8,770 times too large.
    """
    groups, config = process_groups(), transformer_config(num_layers=1)
    model = build_model(KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="k"), config)
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    wrapped = DistributedDataParallel(config, options, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True), [wrapped],
        use_gloo_process_groups=False, pg_collection=groups,
    )  # fmt: skip
    (distributed,) = optimizer.chained_optimizers
    assert (len(distributed.buffers[0].buckets) > 2) == (bucket_size is not None)
    distributed._init_optimizer_states_with_dummy_values()
    state = distributed.sharded_param_state_fully_reshardable(model.sharded_state_dict(), metadata={})
    saved = {part["param"].key.removeprefix("optimizer.state.param."): part["param"] for part in state.values()}
    parameters = dict(model.named_parameters())
    assert len(state) == len(parameters)
    compared = 0
    for name, parameter in parameters.items():
        if isinstance(part := saved.get(name), ShardedTensor):
            assert torch.equal(part.data.view_as(parameter), parameter), name
            compared += 1
    assert compared > len(parameters) / 2
