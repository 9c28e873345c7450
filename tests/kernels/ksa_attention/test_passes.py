"""The two passes into memory of the caller's: a sequence whose second part attends to itself and to what is before."""

import pytest
import torch
import triton
from attention_cases import compare, document_starts, random_rows
from torch import Tensor
from triton.language import standard

from megatron_ksa.kernels.ksa_attention import KSAGeometry, reference, triton_passes
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
    TextOutputs,
)
from megatron_ksa.kernels.ksa_attention.triton_config import HALF, HOPPER
from megatron_ksa.kernels.softmax_merge import reference as merge_reference
from megatron_ksa.kernels.softmax_merge import triton_kernels as merge_kernels

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
MERGES = {reference: merge_reference.merge_into, triton_passes: merge_kernels.merge_into}
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


class Parts(torch.autograd.Function):
    """KSA attention of a sequence of `n` text rows in two parts of `cut` and n - cut, multiples of the chunk size.

    Rows are laid out `[text | summaries]`. Each part attends to itself with its summaries' queries, as of a whole
    sequence; the second one's queries then attend to the text within the window and the summaries before. Results of
    the backward pass are poisoned first: what nobody writes is NaN.
    """

    @staticmethod
    def forward(ctx, q, k, v, document_start, module, geometry, n, cut):
        ctx.settings = module, geometry, n, cut
        out, statistics = torch.full_like(q, torch.nan), []
        for part in range(2):
            rows, summary_q, sizes = own(part, (q, k, v), document_start, *ctx.settings[1:])
            text, summaries = views(out, part, *ctx.settings[1:])
            lse = torch.full((q.shape[0], q.shape[2], rows.q.shape[1]), torch.nan, device=q.device, dtype=lse_type(q))
            statistics.append(TextOutputs(text, lse))
            module.forward(rows, SummaryForward(summary_q, summaries), statistics[-1], sizes)
        rows, sizes = far((q, k, v), document_start, *ctx.settings[1:])
        results = TextOutputs(torch.empty_like(rows.q), torch.empty_like(statistics[1].lse))
        module.forward(rows, SummaryForward(rows.q[:, :0], rows.q[:, :0]), results, sizes)
        MERGES[module](*statistics[1], *results)
        ctx.save_for_backward(q, k, v, document_start, out, *(lse for _, lse in statistics))
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, document_start, out, *statistics = ctx.saved_tensors
        module, *settings = ctx.settings
        gradients = [torch.full_like(rows, torch.nan) for rows in (q, k, v)]
        for part in range(2):
            rows, summary_q, sizes = own(part, (q, k, v), document_start, *settings)
            (dq, dq_s), (dk, dk_s), (dv, dv_s) = (views(rows, part, *settings) for rows in gradients)
            d_text, d_summaries = views(d_out, part, *settings)
            module.backward(
                rows, SummaryBackward(summary_q, d_summaries, dq_s),
                TextOutputs(views(out, part, *settings)[0], statistics[part]), d_text,
                Gradients(dq, dk, dv, dk_s, dv_s), sizes,
            )  # fmt: skip
        rows, sizes = far((q, k, v), document_start, *settings)
        d_far = Gradients(*(torch.full_like(tensor, torch.nan) for tensor in rows[:5]))
        module.backward(
            rows, SummaryBackward(*[rows.q[:, :0]] * 3), TextOutputs(views(out, 1, *settings)[0], statistics[1]),
            views(d_out, 1, *settings)[0], d_far, sizes,
        )  # fmt: skip
        places = far(gradients, document_start, *settings)[0]
        for total, gradient in zip(places[:5], d_far, strict=True):
            total += gradient
        return *gradients, *[None] * 5


def lse_type(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def views(rows: Tensor, part: int, geometry: KSAGeometry, n: int, cut: int) -> tuple[Tensor, Tensor]:
    """Text and summaries of a part."""
    count = cut // geometry.chunk_size * geometry.summary_tokens
    text, summaries = rows[:, :n], rows[:, n:]
    return (text[:, cut:], summaries[:, count:]) if part else (text[:, :cut], summaries[:, :count])


def sizes_of(geometry: KSAGeometry, q: Tensor, query_start: int, key_start: int) -> Sizes:
    summary_tokens, scale = max(geometry.summary_tokens, 1), q.shape[-1] ** -0.5
    return Sizes(geometry.chunk_size, summary_tokens, geometry.window_chunks, query_start, key_start, 0, scale)


def own(part: int, heads: tuple, document_start: Tensor | None, geometry: KSAGeometry, n: int, cut: int):
    (q, q_s), (k, k_s), (v, v_s) = (views(rows, part, geometry, n, cut) for rows in heads)
    if document_start is not None:
        start = cut * part
        document_start = (document_start[:, start : start + q.shape[1]] - start).clamp(min=0)
    return Rows(q, k, v, k_s, v_s, document_start), q_s, sizes_of(geometry, q, 0, 0)


def far(heads: tuple, document_start: Tensor | None, geometry: KSAGeometry, n: int, cut: int):
    """What the second part's text queries see of the first part."""
    q, _ = views(heads[0], 1, geometry, n, cut)
    (k, k_s), (v, v_s) = (views(rows, 0, geometry, n, cut) for rows in heads[1:])
    first = max(0, cut - geometry.window_chunks * geometry.chunk_size)
    return Rows(q, k[:, first:], v[:, first:], k_s, v_s, document_start), sizes_of(geometry, q, cut, first)


# Geometry, text rows, the cut, cuts of documents, query and K/V heads. Windows shorter and longer than either part.
CASES = [
    (KSAGeometry(4, 1, 2), 56, 24, (), (2, 2)),
    (KSAGeometry(4, 2, 2), 56, 24, (10, 33), (4, 2)),
    (KSAGeometry(4, 1, 0), 40, 16, (17,), (2, 1)),
    (KSAGeometry(4, 1, 8), 56, 24, (), (2, 2)),
    (KSAGeometry(4, 1, 1000), 40, 24, (30,), (2, 2)),
    (KSAGeometry(4, 0, 3), 40, 20, (23,), (2, 1)),
]


def check(module, case: tuple, dim: int, dtype: torch.dtype) -> None:
    geometry, n, cut, cuts, (heads, groups) = case
    rows = n + n // geometry.chunk_size * geometry.summary_tokens
    start = document_starts(cuts, n, 2, DEVICE) if cuts else None
    compare(
        ("out", "dq", "dk", "dv"),
        lambda q, k, v: [Parts.apply(q, k, v, start, module, geometry, n, cut)],
        lambda q, k, v: [reference.attention(q, k, v, geometry, text_rows=n, document_start=start)],
        random_rows(0, 2, dim, dtype, (rows, heads), (rows, groups), (rows, groups), device=DEVICE),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_in_parts_is_the_whole(case):
    check(reference, case, 8, torch.float64)


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_in_parts_are_the_whole(case):
    check(triton_passes, case, 16, torch.float32)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    "case",
    [
        (KSAGeometry(8, 1, 16), 2048, 1024, (), (4, 4)),
        (KSAGeometry(8, 1, 16), 2048, 1000, (300, 1701), (8, 2)),
        (KSAGeometry(8, 2, 100), 1544, 1032, (1100,), (4, 4)),
        (KSAGeometry(8, 1, 0), 1024, 512, (), (4, 2)),
        (KSAGeometry(8, 1, 1000), 1024, 512, (), (4, 4)),
        (KSAGeometry(8, 0, 16), 1024, 512, (), (4, 4)),
    ],
    ids=str,
)
def test_specialised_kernels_in_parts_are_the_whole(case):
    check(triton_passes, case, 128, torch.bfloat16)


def test_summary_queries_go_beside_text_queries_where_their_rows_lie_alike():
    """A copy of one kind of rows has other strides, which the kernels would read as those of the other kind."""
    geometry, n, cut = KSAGeometry(8, 1, 4), 128, 64
    heads = [torch.zeros(2, 144, 2, 128) for _ in range(3)]
    rows, summary_q, sizes = own(1, heads, None, geometry, n, cut)
    queries = (rows.q, summary_q)
    numbers = tuple(HOPPER[128].pack())
    assert triton_passes._beside(rows, sizes, numbers, queries)
    assert not triton_passes._beside(rows, sizes, tuple(HALF[128].pack()), queries)
    assert not triton_passes._beside(rows, sizes, numbers, (rows.q, summary_q.contiguous()))
    assert not triton_passes._beside(rows._replace(v=rows.v.contiguous()), sizes, numbers, queries)
    assert not triton_passes._beside(rows, sizes._replace(query_start=64, key_start=64), numbers, queries)
    assert not triton_passes._beside(rows, sizes, numbers, (rows.q, summary_q[:, :0]))
