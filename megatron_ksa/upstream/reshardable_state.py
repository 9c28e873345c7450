"""The distributed optimizer's state in checkpoints, where the buckets of its gradient buffer are padded.

Megatron 0.19.2 pads each bucket to a multiple of the data-parallel size (and of 128).

With `--dist-ckpt-optim-fully-reshardable` it joins the buckets' state without that padding, and then takes each
parameter's part from where the parameter lies in the buffer with it. From the second bucket on, which
`--overlap-grad-reduce` makes, parameters and moments were saved shifted by the padding before them, without an error,
and a resumed run trained on from those.

Without that flag each rank saves its part of every bucket, and where a part is padding alone, saving ended in an
assertion: with 2 ranks that of a bucket of one norm of 64 channels.
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


class _Part(list):
    """A rank's part of a bucket, of which Megatron wants to hear that it is not empty."""

    def __bool__(self) -> bool:
        return True


def _parts(original: Callable) -> Callable:
    """`DistributedOptimizer.get_parameter_state_dp_reshardable`, where a part of a bucket may be padding alone."""

    @wraps(original)
    def get_parameter_state_dp_reshardable(self: DistributedOptimizer) -> dict:
        state = original(self)
        for number in range(len(self.gbuf_ranges)):
            for parts in state[number].values():
                parts[:] = [part or _Part() for part in parts]
        return state

    return get_parameter_state_dp_reshardable


def _load_parts(original: Callable) -> Callable:
    """`DistributedOptimizer.load_parameter_state_from_dp_reshardable`, where a part of a bucket may be padding alone.

    What is read of a checkpoint has no empty lists: the parts after such a part stand in the places before theirs.
    """

    @wraps(original)
    def load_parameter_state_from_dp_reshardable(self: DistributedOptimizer, state_dict: dict) -> None:
        for number, ranges in enumerate(self.gbuf_ranges):
            for dtype, buckets in ranges.items():
                parts = state_dict[number][dtype]
                filled = iter([part for part in parts if not all(entry["padding"] for entry in part)])
                parts[:] = [next(filled) if bucket["param_map"] else [] for bucket in buckets]
        original(self, state_dict)

    return load_parameter_state_from_dp_reshardable


OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
PATCHES = (
    Patch(
        f"{OPTIMIZER}.get_parameter_state_dp_reshardable", _parts,
        why="a rank whose part of a bucket is padding cannot save", expects="(self)",
    ),
    Patch(
        f"{OPTIMIZER}.load_parameter_state_from_dp_reshardable", _load_parts,
        why="a rank whose part of a bucket is padding cannot load", expects="(self, state_dict)",
    ),
    Patch(
        f"{OPTIMIZER}.sharded_param_state_fully_reshardable", _sharded,
        why="state behind a padded bucket is saved shifted",
        expects="(self, model_sharded_state_dict, is_loading=False, metadata=None)",
    ),
)  # fmt: skip
