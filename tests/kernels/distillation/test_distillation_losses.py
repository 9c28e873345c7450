"""Cross-entropy and KL divergence over shards of the words: kernels and reference against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
import triton
from triton.language import standard

from megatron_ksa.kernels.distillation import reference, triton_kernels
from megatron_ksa.kernels.distillation.reference import RowStatistics

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
# Relative to the largest value: rounding of float32 sums over the words, and of stored 16-bit gradients. The
# interpreter cuts bfloat16 off instead of rounding it.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}
SHAPES = [(7, 4096, 1.0, 4.0), (5, 5001, 0.7, 8.0), (3, 37, 2.0, 1e-3)]
CE, KL = 1.0, 5.0


def case(rows, words, dtype, size=4.0):
    """Student, a teacher near it, and labels, of which the first and the last are not in the shard."""
    torch.manual_seed(rows + words)
    student = torch.randn(rows, words, dtype=torch.float64) * size
    teacher = student + torch.randn(rows, words, dtype=torch.float64) * size / 10
    labels = torch.randint(0, words, (rows,), device=DEVICE)
    labels[0], labels[-1] = -3, words + 5
    return student.to(dtype).to(DEVICE), teacher.to(dtype).to(DEVICE), labels


def assert_close(actual, expected, tolerance, largest=None):
    """Relative to the largest value expected, or, of a difference, to the largest term."""
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs().max() / (largest or expected.abs().max())
    assert error <= tolerance, float(error)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "words", "scale", "size"), SHAPES)
def test_kernels_are_the_reference(dtype, rows, words, scale, size):
    student, teacher, labels = case(rows, words, dtype, size)
    expected = reference.statistics(student.double(), teacher.double(), labels, scale)
    actual = triton_kernels.statistics(student, teacher, labels, scale)
    # A sum of differences of both signs is as exact as its terms.
    x, t = student.double() * scale, teacher.double() * scale
    terms = ((t - expected.teacher_peak[:, None]).exp() * (t - x).abs()).sum(-1).max()
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        assert_close(a, e, TOLERANCES[torch.float32], terms if name == "cross" else None)
    wanted = reference.gradients(student.double(), teacher.double(), labels, expected, CE, KL, scale)
    given = RowStatistics(*(part.float() for part in expected))
    student_before = student.double()
    got = triton_kernels.gradients(student, teacher, labels, given, CE, KL, scale)
    assert got.dtype == dtype and got.data_ptr() == student.data_ptr()
    # Terms are rounded in float32, and the result, which is larger at the label, when it is stored.
    terms = (CE + KL) * scale * (student_before * scale).softmax(-1).max()
    assert_close(got, wanted, TOLERANCES[dtype], max(terms, wanted.abs().max()))


@needs_kernels
def test_a_block_of_masked_words_counts_nothing():
    """Padded words may be -inf in both: a whole block of them must not give NaN."""
    student = torch.full((2, 8200), float("-inf"), device=DEVICE)
    student[:, 5000:5003] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    teacher = student.clone()
    teacher[:, 5000] = 2.5
    labels = torch.tensor([5001, 5002], device=DEVICE)
    log_q, log_p = (part[:, 5000:5003].log_softmax(-1) for part in (student, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    for kind in (reference, triton_kernels):
        made = kind.statistics(student.clone(), teacher, labels, 1.0)
        torch.testing.assert_close(made.divergence(), expected)
        torch.testing.assert_close(made.cross_entropy(), F.cross_entropy(student, labels, reduction="none"))
        gradients = kind.gradients(student.clone(), teacher, labels, made, CE, KL, 1.0)
        assert not gradients.isnan().any() and (gradients != 0).sum() == 6


def test_reference_is_torchs_losses():
    student, teacher, labels = case(6, 90, torch.float64)
    labels = labels.clamp(0, 89)
    leaf = student.clone().requires_grad_()
    log_q, log_p = (leaf * 1.5).log_softmax(-1), (teacher * 1.5).log_softmax(-1)
    ce = F.cross_entropy(leaf * 1.5, labels, reduction="none")
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    made = reference.statistics(student, teacher, labels, 1.5)
    torch.testing.assert_close(made.cross_entropy(), ce.detach())
    torch.testing.assert_close(made.divergence(), kl.detach())
    (expected,) = torch.autograd.grad((CE * ce + KL * kl).sum(), leaf)
    torch.testing.assert_close(reference.gradients(student, teacher, labels, made, CE, KL, 1.5), expected)
