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


def case(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """a, lse_a, b, lse_b, views with strides of their own; b has no key in the first row."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, rows, heads, dim = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    a = random(rows + 2, batch, heads, dim).to(dtype)[1:-1].transpose(0, 1)
    b = random(rows, batch, heads, dim).to(dtype).transpose(0, 1)
    lse_a, lse_b = random(batch, heads, rows + 3).mul_(3)[..., :rows], random(batch, heads, rows).mul_(3)
    b[:, 0], lse_b[:, :, 0] = 0, float("-inf")
    return [a, lse_a, b, lse_b]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert not actual.isnan().any() and not expected.isnan().any()
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCES[dtype], float(error)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(shape, dtype):
    inputs = case(shape, dtype)
    exact, kept = [each.double() for each in inputs], [each.clone() for each in inputs[2:]]
    around = inputs[1]._base.clone()
    reference.merge_into(*exact)
    triton_kernels.merge_into(*inputs)
    assert_close(inputs[0], exact[0], dtype)
    assert_close(inputs[1], exact[1], torch.float32)
    assert all(torch.equal(each, before) for each, before in zip(inputs[2:], kept, strict=True))
    assert torch.equal(inputs[1]._base[..., shape[1] :], around[..., shape[1] :])


@needs_kernels
def test_far_apart_log_sum_exps_do_not_overflow():
    a, b = (torch.ones(1, 2, 1, 16, device=DEVICE) * value for value in (1, 3))
    lse_a, lse_b = (torch.tensor([[values]], device=DEVICE) for values in ([200.0, -200.0], [-200.0, 200.0]))
    triton_kernels.merge_into(a, lse_a, b, lse_b)
    assert a[0, :, 0, 0].tolist() == [1, 3] and lse_a[0, 0].tolist() == [200, 200]


def test_two_halves_are_the_softmax_over_all_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64, generator=generator) for n in (5, 9, 9))

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, keys])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, keys]), scores.logsumexp(-1)

    merged, whole = attend(slice(0, 4)), attend(slice(0, 9))
    reference.merge_into(*merged, *attend(slice(4, 9)))
    for one, other in zip(merged, whole, strict=True):
        torch.testing.assert_close(one, other)
