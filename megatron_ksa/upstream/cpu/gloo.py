"""Collectives that Megatron asks for and gloo does not have: parts of different sizes along the first dimension.

Tensor-parallel experts gather the tokens of each rank, as many as the router sent there.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.upstream.patches import Patch


def _gather(original: Callable) -> Callable:
    @wraps(original)
    def gather(
        part: Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        """[own rows, ...] -> [rows of all ranks, ...]; parts are padded to the longest on the wire."""
        if output_split_sizes is None or group.size() == 1:
            return original(part, group, output_split_sizes, use_global_buffer)
        padded = part.new_zeros(max(output_split_sizes), *part.shape[1:])
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter(original: Callable) -> Callable:
    @wraps(original)
    def reduce_scatter(
        whole: Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        """[rows of all ranks, ...] -> [own rows, ...], summed over the ranks; the whole sum is on the wire."""
        if input_split_sizes is None or group.size() == 1:
            return original(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter


MAPPINGS = "megatron.core.tensor_parallel.mappings"
WHY = "gloo has no collective for parts of different sizes"
PATCHES = (
    Patch(
        f"{MAPPINGS}:_gather_along_first_dim",
        _gather,
        why=WHY,
        expects="(input_, group, output_split_sizes=None, use_global_buffer=False)",
    ),
    Patch(
        f"{MAPPINGS}:_reduce_scatter_along_first_dim",
        _reduce_scatter,
        why=WHY,
        expects="(input_, group, input_split_sizes=None, use_global_buffer=False)",
    ),
)
