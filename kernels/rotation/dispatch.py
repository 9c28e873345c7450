"""Norm and rotation of heads by device (see `kernels/dispatch.py`): Triton kernels or the PyTorch reference."""

from torch import Tensor

from megatron_ksa.kernels.dispatch import uses_triton
from megatron_ksa.kernels.rotation import reference

OP = "norm and rotation of query and key heads"


def rotate(
    parts: list[Tensor],
    queries: int,
    weights: list[tuple[Tensor, Tensor] | None],
    positions: Tensor,
    frequencies: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate query and key heads; arguments and results as in `reference.rotate`.

    Raises:
        UsageError: on CUDA, dtypes, head dimension, numbers of heads or positions that the kernels do not take.
    """
    run = reference.rotate
    if uses_triton(OP, parts[0]):
        from megatron_ksa.kernels.rotation.triton_rotation import rotate as run
    return run(parts, queries, weights, positions, frequencies, eps=eps, zero_centered=zero_centered,
               interleaved=interleaved)  # fmt: skip
