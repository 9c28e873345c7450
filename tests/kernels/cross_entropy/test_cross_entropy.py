"""Cross-entropy over shards of the words: the Triton kernels against the reference in float64, and torch's loss."""

import pytest
import torch
import torch.nn.functional as F
import triton
from triton.language import standard

from megatron_ksa.kernels.cross_entropy import reference, triton_kernels

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
# Relative to the largest value: rounding of float32 sums over the words, and of stored 16-bit gradients. The
# interpreter cuts bfloat16 off instead of rounding it.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
SHAPES = [(7, 4096, 1.0, 4.0), (5, 5001, 0.7, 60.0), (3, 37, 2.0, 1e-3)]


def case(rows, words, dtype, scale=1.0, size=4.0):
    torch.manual_seed(rows + words)
    logits = (torch.randn(rows, words, dtype=torch.float64) * size).to(dtype).to(DEVICE)
    labels = torch.randint(0, words, (rows,), device=DEVICE)
    labels[0] = -3
    labels[-1] = words + 5
    d_loss = torch.rand(rows, device=DEVICE) + 0.1
    return logits, labels, d_loss, scale


def assert_close(actual, expected, dtype, rounding=0.0):
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[dtype] + rounding, float(error)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "words", "scale", "size"), SHAPES)
def test_kernels_are_the_reference(dtype, rows, words, scale, size):
    logits, labels, d_loss, scale = case(rows, words, dtype, scale, size)
    expected = reference.statistics(logits.double(), labels, scale)
    actual = triton_kernels.statistics(logits, labels, scale)
    peak, total, _ = expected
    # Half the spacing of float32 at the largest logit: a GPU rounds the peak, and not the product that it is taken
    # from. Every exponential is off by as much, 1e-5 at 170: 4e-6 of the sum here.
    rounding = float(peak.abs().max()) * 2**-24
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float32, rounding)
    wanted = reference.gradients(logits.double(), labels, peak, total, d_loss.double(), scale)
    got = triton_kernels.gradients(logits, labels, peak.float(), total.float(), d_loss, scale)
    assert got.dtype == dtype and got.data_ptr() == logits.data_ptr()
    assert_close(got, wanted, dtype, rounding)


@needs_kernels
def test_a_block_of_masked_words_counts_nothing():
    """Padded words may be -inf: a whole block of them must not give NaN."""
    logits = torch.full((2, 8200), float("-inf"), device=DEVICE)
    logits[:, 5000:5003] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    labels = torch.tensor([5001, 5002], device=DEVICE)
    peak, total, picked = triton_kernels.statistics(logits, labels, 1.0)
    loss = peak + total.log() - picked
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    gradients = triton_kernels.gradients(logits, labels, peak, total, torch.ones(2, device=DEVICE), 1.0)
    assert not gradients.isnan().any() and (gradients != 0).sum() == 6


def test_shards_together_are_torchs_loss():
    """Two shards combined by peak, sum and picked logit, as ranks do."""
    logits, labels, d_loss, _ = case(6, 90, torch.float64)
    logits, labels, d_loss = logits.cpu(), labels.clamp(0, 89).cpu(), d_loss.cpu().double()
    shards = [(logits[:, :40], labels), (logits[:, 40:], labels - 40)]
    parts = [reference.statistics(part, local, 1.5) for part, local in shards]
    peak = torch.stack([part[0] for part in parts]).amax(0)
    total = sum(total * (own - peak).exp() for own, total, _ in parts)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf * 1.5, labels, reduction="none")
    torch.testing.assert_close(peak + total.log() - parts[0][2] - parts[1][2], expected.detach())
    (d_logits,) = torch.autograd.grad(expected, leaf, d_loss)
    own = [reference.gradients(part, local, peak, total, d_loss, 1.5) for part, local in shards]
    torch.testing.assert_close(torch.cat(own, dim=1), d_logits)
