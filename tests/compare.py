"""One comparison of tensors, with one tolerance table, for all tests."""

import torch
from torch import Tensor

# ||a - b|| / ||b|| allowed for a result computed in the dtype and compared with a more exact one.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Fail with the place and size of the worst difference unless ||actual - expected|| / ||expected|| is small.

    Args:
        name: what is compared, for the message.
        tolerance: largest ratio of norms; by default that of the table for actual's dtype.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    difference = actual.detach().double() - expected.detach().double()
    scale = expected.detach().double().norm().item()
    ratio = difference.norm().item() / scale if scale else difference.norm().item()
    if ratio > limit:
        worst = torch.unravel_index(difference.abs().argmax(), difference.shape)
        where = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{name}: relative error {ratio:.3e} > {limit:.1e}; worst at {where}: "
            f"{actual[where].item()!r}, expected {expected[where].item()!r}"
        )
