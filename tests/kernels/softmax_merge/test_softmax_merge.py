"""Merging two softmaxes: the definition over all keys, and the Triton kernels against the reference in float64."""

import pytest
import torch
import triton
from triton.language import standard

from megatron_ksa.kernels.softmax_merge import reference, triton_kernels

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
# Relative to the largest value: rounding of float32 sums, and of stored 16-bit rows. The interpreter cuts bfloat16 off
# instead of rounding it.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}
# Batch, rows, heads, head_dim: pairs that no program divides, a head_dim that is no power of two.
SHAPES = [(1, 37, 3, 16), (2, 8, 4, 24), (1, 1, 1, 128)]


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """a, lse_a, b, lse_b, where b has no key in the first row; the output's gradient, a view with other strides."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, rows, heads, dim = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    a, b = (random(*shape).to(dtype).to(DEVICE) for _ in range(2))
    lse_a, lse_b = (3 * random(batch, heads, rows).to(DEVICE) for _ in range(2))
    b[:, 0], lse_b[:, :, 0] = 0, float("-inf")
    d_out = random(rows + 2, batch, heads, dim).to(dtype).to(DEVICE)[1:-1].transpose(0, 1)
    return [each.requires_grad_() for each in (a, lse_a, b, lse_b)], d_out


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert not actual.isnan().any() and not expected.isnan().any()
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCES[dtype], float(error)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_reference(shape, dtype):
    inputs, d_out = case(shape, dtype)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = reference.merge(*exact)
    actual = triton_kernels.merge(*inputs)
    assert actual.dtype == dtype and actual.shape == shape
    assert_close(actual, expected, dtype)
    wanted = torch.autograd.grad(expected, exact, d_out.double())
    for got, gradient, of in zip(torch.autograd.grad(actual, inputs, d_out), wanted, inputs, strict=True):
        # A single row's log-sum-exps may have no gradient at all.
        assert got.dtype == of.dtype
        assert_close(got, gradient, dtype)


@needs_kernels
def test_rows_that_are_no_neighbours_in_memory():
    """Inputs and the output's gradient may be views: a segment of a tensor of several, a gradient that is one value."""
    inputs, _ = case((2, 8, 4, 24), torch.float32)
    views = [each.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_() for each in inputs]
    torch.testing.assert_close(triton_kernels.merge(*views), reference.merge(*inputs))
    for got, wanted in zip(
        torch.autograd.grad(triton_kernels.merge(*views).sum(), views),
        torch.autograd.grad(reference.merge(*inputs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_two_halves_are_the_softmax_over_all_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64, generator=generator) for n in (5, 9, 9))
    k.requires_grad_()

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, keys])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, keys]), scores.logsumexp(-1)

    merged, whole = reference.merge(*attend(slice(0, 4)), *attend(slice(4, 9))), attend(slice(0, 9))[0]
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), k)[0] for out in (merged, whole)))
