"""Sums of the parts of a gradient."""

import pytest
import torch
import triton
from triton.language import standard

from megatron_ksa.kernels.column_sums import column_sums

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(1, 16), (300, 2, 24), (128, 7), (0, 5), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_over_the_first_dimension(shape, dtype):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = column_sums(parts, dtype)
    assert got.dtype == dtype and got.shape == parts.shape[1:]
    torch.testing.assert_close(got, parts.double().sum(0).to(dtype))


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("view", [lambda parts: parts[::2], lambda parts: parts[:, :3], lambda parts: parts.mT])
def test_parts_may_be_a_view(view):
    """Every other row was taken for every row: the kernel knew the number of columns, and no stride."""
    parts = view(torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    torch.testing.assert_close(column_sums(parts, torch.float32), parts.sum(0))
