"""RMS norm beside a residual connection: the Triton kernels against the reference in float64."""

import pytest
import torch
import triton
from compare import assert_close
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.norm import reference, triton_norm

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def case(shape, dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(shape, generator=generator) + 0.02
    weight = torch.randn(shape[-1], generator=generator)
    return x.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, weight_dtype).requires_grad_()


def results(norm, x, weight, zero_centered, d_dtype, residual=True):
    """y, and the gradients of x and weight where y and, with residual, x are used."""
    y, same = norm(x, weight, 1e-3, zero_centered)
    generator = torch.Generator().manual_seed(1)
    d_y, d_same = (torch.randn(y.shape, generator=generator).to(DEVICE, d_dtype).to(y.dtype) for _ in range(2))
    outputs, gradients = ([y, same], [d_y, d_same]) if residual else ([y], [d_y])
    return [y, *torch.autograd.grad(outputs, [x, weight], gradients)]


@needs_kernels
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "weight_dtype", "programs"),
    [
        ((5, 3, 64), torch.float32, torch.float32, 4),
        ((7, 24), torch.float32, torch.float32, 1056),
        ((9, 1, 100), torch.bfloat16, torch.bfloat16, 2),
        ((6, 512), torch.bfloat16, torch.float32, 1056),
        ((1, 16), torch.float16, torch.float16, 3),
    ],
)
def test_equals_the_reference_in_float64(monkeypatch, shape, dtype, weight_dtype, programs, zero_centered, residual):
    monkeypatch.setattr(triton_norm, "PROGRAMS", programs)
    x, weight = case(shape, dtype, weight_dtype)
    got = results(triton_norm.rms_norm, x, weight, zero_centered, dtype, residual)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = results(reference.rms_norm, *exact, zero_centered, dtype, residual)
    for name, actual, wanted in zip(("y", "d x", "d weight"), got, expected, strict=True):
        assert_close(name, actual, wanted)


@needs_kernels
def test_rows_that_are_only_the_residual_pass_their_gradient_on():
    x, weight = case((4, 16), torch.float32, torch.float32)
    _, same = triton_norm.rms_norm(x, weight, 1e-3)
    (d_x,) = torch.autograd.grad(same.sum(), [x])
    assert torch.equal(d_x, torch.ones_like(x))


@needs_kernels
def test_no_rows():
    x, weight = case((0, 2, 16), torch.float32, torch.float32)
    y, d_x, d_weight = results(triton_norm.rms_norm, x, weight, False, torch.float32)
    assert y.shape == d_x.shape == x.shape and torch.equal(d_weight, torch.zeros_like(weight))


def test_what_the_kernels_do_not_take_is_named():
    x, weight = torch.zeros(2, 8), torch.zeros(4)
    with pytest.raises(UsageError, match="rows of 8 and a weight of shape"):
        triton_norm.rms_norm(x, weight, 1e-3)
    with pytest.raises(UsageError, match="float64"):
        triton_norm.rms_norm(x.double(), torch.zeros(8), 1e-3)
