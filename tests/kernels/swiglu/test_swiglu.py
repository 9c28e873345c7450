"""SwiGLU: the Triton kernels against the reference in float64."""

import pytest
import torch
import triton
from compare import assert_close
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.swiglu import reference, triton_swiglu

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 2, 64), (3, 2048), (2, 4200), (1, 2), (0, 8)])
def test_equals_the_reference_in_float64(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
    y = triton_swiglu.swiglu(x)
    d_y = torch.randn(y.shape, generator=generator).to(DEVICE, dtype)
    (d_x,) = torch.autograd.grad(y, x, d_y)
    exact = x.detach().double().requires_grad_()
    wanted = reference.swiglu(exact)
    (d_wanted,) = torch.autograd.grad(wanted, exact, d_y.double())
    assert y.dtype == d_x.dtype == dtype and y.shape == wanted.shape
    if y.numel():
        assert_close("y", y, wanted)
        assert_close("d x", d_x, d_wanted)


def test_the_reference_is_torchs():
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(reference.swiglu(x), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])


def test_what_the_kernels_do_not_take_is_named():
    with pytest.raises(UsageError, match="rows of 5 channels"):
        triton_swiglu.swiglu(torch.zeros(2, 5))
