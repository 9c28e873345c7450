"""The distributed optimizer's state in checkpoints of `--dist-ckpt-optim-fully-reshardable`, where buckets are padded.

Megatron 0.19.2 pads each bucket of its gradient buffer to a multiple of the data-parallel size (and of 128). For this
format it joins the buckets' state without that padding, and then takes each parameter's part from where the parameter
lies in the buffer with it. From the second bucket on, which `--overlap-grad-reduce` makes, parameters and moments were
saved shifted by the padding before them, without an error, and a resumed run trained on from those.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ksa.upstream.patches import Patch


def _sharded(original: Callable) -> Callable:
    """`DistributedOptimizer.sharded_param_state_fully_reshardable`, which is given state laid out as the buffers."""

    @wraps(original)
    def sharded_param_state_fully_reshardable(
        self: DistributedOptimizer, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        joined = self.get_parameter_state_dp_zero

        def as_in_buffers(**options: Any) -> dict | None:
            state = joined(**options)
            for number, buffer in enumerate(self.buffers if state is not None else ()):
                for tensors in state[number].values():
                    tensors.update({key: _padded(value, buffer) for key, value in tensors.items()})
            return state

        self.get_parameter_state_dp_zero = as_in_buffers
        try:
            return original(self, model_sharded_state_dict, is_loading, metadata)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def _padded(joined: Tensor | int, buffer: Any) -> Tensor | int:
    """State of all buckets one after the other, [elements without padding], where it lies in the buffer [elements]."""
    if not isinstance(joined, Tensor):
        return joined
    whole, start = joined.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + size] = joined[start : start + size]
        start += size
    return whole


PATCHES = (
    Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        _sharded,
        why="state behind a padded bucket is saved shifted",
        expects="(self, model_sharded_state_dict, is_loading=False, metadata=None)",
    ),
)
