"""The blockwise PyTorch attention against the released implementation and against a dense mask."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.reference import summary_attention, text_attention

GOLDEN = Path(__file__).parents[2] / "golden" / "ksa_attention"


def attend(q, k, v, geometry, n, document_start=None):
    """KSA over rows laid out `[text | summaries]`."""
    whole = n // geometry.chunk_size * geometry.chunk_size
    text, _ = text_attention(q[:, :n], k[:, :n], v[:, :n], k[:, n:], v[:, n:], geometry, document_start=document_start)
    if n == q.shape[1]:
        return text
    summaries = summary_attention(
        q[:, n:], k[:, :whole], v[:, :whole], k[:, n:], v[:, n:], geometry, document_start=document_start
    )
    return torch.cat([text, summaries], dim=1)


def dense_mask(n, geometry, document):
    """Visibility of every pair of rows, written from the rules of the paper pair by pair; document: [n] ids."""
    C, S, W = geometry.chunk_size, geometry.summary_tokens, geometry.window_chunks
    rows = [("text", i, None) for i in range(n)] + [("summary", c, s) for c in range(n // C) for s in range(S)]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for a, (kind_q, i, s_q) in enumerate(rows):
        for b, (kind_k, j, s_k) in enumerate(rows):
            if kind_q == "text" and kind_k == "text":
                mask[a, b] = j <= i and i // C - j // C <= W and document[i] == document[j]
            elif kind_q == "text":
                mask[a, b] = i // C - j > W and document[j * C + C - 1] == document[i]
            elif kind_k == "text":
                mask[a, b] = j // C == i and document[j] == document[i * C + C - 1]
            else:
                mask[a, b] = i == j and s_k <= s_q
    return mask


def dense_attention(q, k, v, mask):
    """Plain softmax attention under a [rows, rows] mask."""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("case", range(4))
def test_golden_output_and_gradients(case):
    data = np.load(GOLDEN / f"case{case}.npz")
    geometry = KSAGeometry(*(int(data[key]) for key in ("chunk_size", "summary_num", "window_chunks")))
    period = geometry.chunk_size + geometry.summary_tokens
    is_text = np.arange(data["q"].shape[1]) % period < geometry.chunk_size
    order = torch.tensor(np.concatenate([np.flatnonzero(is_text), np.flatnonzero(~is_text)]))
    q, k, v = (torch.tensor(data[key])[:, order].requires_grad_() for key in "qkv")
    out = attend(q, k, v, geometry, int(is_text.sum()))
    out.backward(torch.tensor(data["dout"])[:, order])
    for name, actual in (("out", out), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
        assert_close(name, actual, torch.tensor(data[name])[:, order])


@st.composite
def cases(draw):
    """Chunk size, summaries, window, length, and the lengths of packed documents."""
    geometry = KSAGeometry(draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 5)))
    n = draw(st.integers(1, 48))
    cuts = sorted(draw(st.sets(st.integers(1, max(n - 1, 1)), max_size=4)))
    document = torch.zeros(n, dtype=torch.long)
    for cut in cuts:
        document[cut:] += 1
    return geometry, n, document


@given(cases(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_equals_dense_mask_in_float64(case, seed):
    geometry, n, document = case
    generator = torch.Generator().manual_seed(seed)
    rows = n + n // geometry.chunk_size * geometry.summary_tokens
    q, dout = (torch.randn(2, rows, 4, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, rows, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    start = torch.searchsorted(document, document).to(torch.int32).expand(2, -1)
    mask = dense_mask(n, geometry, document.tolist())
    results = []
    for attention in (
        lambda q, k, v: attend(q, k, v, geometry, n, start),
        lambda q, k, v: dense_attention(q, k, v, mask),
    ):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        out.backward(dout)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_past_chunk_is_seen_exactly_once(case):
    """With values one-hot in the chunk, each past chunk of the document gets weight as text or as summaries."""
    geometry, n, document = case
    mask = dense_mask(n, geometry, document.tolist())
    C, S = geometry.chunk_size, geometry.summary_tokens
    for i in range(n):
        for c in range(i // C):
            as_text = mask[i, c * C : c * C + C]
            as_summary = mask[i, n + c * S : n + (c + 1) * S]
            same = document[c * C : c * C + C] == document[i]
            if same.all():
                assert as_text.all() != as_summary.all() and as_text.any() != as_summary.any()
            else:
                assert not (as_text & ~same).any() and not (as_text.any() and as_summary.any())


def test_window_over_the_sequence_is_full_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 45, 2, 8, dtype=torch.float64) for _ in range(3))
    out = attend(q, k, v, KSAGeometry(8, 1, 5), 40)[:, :40]
    expected = dense_attention(q[:, :40], k[:, :40], v[:, :40], torch.ones(40, 40).tril().bool())
    assert_close("text", out, expected)


def test_partial_results_merge_by_log_sum_exp():
    """Text keys and summaries attended to apart and merged equal one pass, values and gradients."""
    torch.manual_seed(1)
    geometry, n = KSAGeometry(4, 1, 2), 40
    leaves = [torch.randn(1, 50, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    text, summaries = zip(*((t[:, :n], t[:, n:]) for t in leaves), strict=True)
    q, k, v = text
    whole, whole_lse = text_attention(q, k, v, summaries[1], summaries[2], geometry)
    expected = torch.autograd.grad((whole * q.detach()).sum(), leaves)
    none = k[:, :0]
    near, near_lse = text_attention(q, k, v, none, none, geometry)
    far, far_lse = text_attention(q, none, none, summaries[1], summaries[2], geometry)
    lse = torch.logaddexp(near_lse, far_lse)
    weights = [torch.exp(part - lse).transpose(1, 2)[..., None] for part in (near_lse, far_lse)]
    merged = weights[0] * near + weights[1] * far
    assert_close("lse", lse, whole_lse)
    assert_close("out", merged, whole)
    gradients = torch.autograd.grad((merged * q.detach()).sum(), leaves)
    for name, actual, wanted in zip("qkv", gradients, expected, strict=True):
        assert_close(f"d{name}", actual, wanted)
