"""Summary queries of KSA attention in one pass: each reads the C text tokens of its chunk and its summaries so far.

A program holds the keys and values of a few chunks and serves every query head that reads them, so each row is read
once, and the backward pass needs neither atomics nor saved statistics. Scores, with p = softmax(scale * q . k):

    dp = dO . v      ds = p * (dp - sum(p * dp))      dq = scale * ds k      dk = scale * ds q      dv = p dO
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.differentiable import differentiable
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import Gradients, Rows, Sizes, new_like
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, check_rows, row_starts
from megatron_ksa.kernels.launch import launch, repeatable

# Elements of a block of text keys held by one program.
BLOCK_ELEMENTS = 4096


@triton.jit
def _rows(p, i_b, i_h, o_n, m_n, o_d, stride_b, stride_n, stride_h, D: tl.constexpr):
    """Pointers to rows o_n (any shape) of one head, and the mask of what exists: [..., BD]."""
    p += i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    return p + tl.expand_dims(o_n.to(tl.int64) * stride_n, -1) + o_d, tl.expand_dims(m_n, -1) & (o_d < D)


@triton.jit
def _load(p, i_b, i_h, o_n, m_n, o_d, stride_b, stride_n, stride_h, D: tl.constexpr):
    """Rows o_n (any shape) of one head, [..., BD]; 0 where there is none."""
    p_rows, m_rows = _rows(p, i_b, i_h, o_n, m_n, o_d, stride_b, stride_n, stride_h, D)
    return tl.load(p_rows, mask=m_rows, other=0.0)


@triton.jit
def _chunk_offsets(
    p_start, i_c, i_b, chunks, key_start, stride_start,
    C: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Rows of the chunks' text [BC, CP] and summaries [BC, SP], which exist, and which text their summaries see."""
    # [BC]
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < chunks
    o_j = tl.arange(0, CP)
    o_s = tl.arange(0, SP)
    # [BC, CP]
    o_text = o_c[:, None] * C + o_j[None, :]
    m_text = m_c[:, None] & (o_j < C)[None, :]
    # [BC, SP]
    o_summary = o_c[:, None] * S + o_s[None, :]
    m_summary = m_c[:, None] & (o_s < S)[None, :]
    m_seen = m_text
    if HAS_DOCUMENTS:
        p_last = p_start + i_b.to(tl.int64) * stride_start + key_start + o_c * C + C - 1
        m_seen = m_text & (key_start + o_text >= tl.load(p_last, mask=m_c, other=0)[:, None])
    return o_c, m_c, o_text, m_text, m_seen, o_summary, m_summary


@triton.jit
def _probabilities(b_q, b_k, b_ks, m_seen, i_s, scale_log2, SP: tl.constexpr):
    """Softmax of one query a chunk, [BC, BD], over the chunk's text [BC, CP] and its summaries up to i_s [BC, SP]."""
    b_text = tl.sum(b_q[:, None, :] * b_k, axis=2) * scale_log2
    b_summary = tl.sum(b_q[:, None, :] * b_ks, axis=2) * scale_log2
    b_text = tl.where(m_seen, b_text, float("-inf"))
    b_summary = tl.where((tl.arange(0, SP) <= i_s)[None, :], b_summary, float("-inf"))
    # [BC]
    b_max = tl.maximum(tl.max(b_text, axis=1), tl.max(b_summary, axis=1))
    b_text = tl.math.exp2(b_text - b_max[:, None])
    b_summary = tl.math.exp2(b_summary - b_max[:, None])
    b_sum = tl.sum(b_text, axis=1) + tl.sum(b_summary, axis=1)
    return b_text / b_sum[:, None], b_summary / b_sum[:, None]


@triton.jit
def _summary_forward_kernel(
    p_q, p_k, p_v, p_ks, p_vs, p_start, p_out, chunks, key_start, scale_log2, groups, stride_start,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, ks_b, ks_n, ks_h, vs_b, vs_n, vs_h, out_b, out_n, out_h,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BC: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Outputs of the summary queries of BC chunks, for all query heads of one K/V head."""
    i_b = tl.program_id(1) // groups
    i_g = tl.program_id(1) % groups
    o_d = tl.arange(0, BD)
    o_c, m_c, o_text, m_text, m_seen, o_summary, m_summary = _chunk_offsets(
        p_start, tl.program_id(0), i_b, chunks, key_start, stride_start, C, S, BC, CP, SP, HAS_DOCUMENTS
    )
    # [BC, CP, BD] and [BC, SP, BD]
    b_k = _load(p_k, i_b, i_g, o_text, m_text, o_d, k_b, k_n, k_h, D)
    b_v = _load(p_v, i_b, i_g, o_text, m_text, o_d, v_b, v_n, v_h, D)
    b_ks = _load(p_ks, i_b, i_g, o_summary, m_summary, o_d, ks_b, ks_n, ks_h, D)
    b_vs = _load(p_vs, i_b, i_g, o_summary, m_summary, o_d, vs_b, vs_n, vs_h, D)
    for i_r in range(0, GROUP):
        for i_s in range(0, S):
            # [BC, BD]
            b_q = _load(p_q, i_b, i_g * GROUP + i_r, o_c * S + i_s, m_c, o_d, q_b, q_n, q_h, D).to(tl.float32)
            b_text, b_summary = _probabilities(b_q, b_k, b_ks, m_seen, i_s, scale_log2, SP)
            b_out = tl.sum(b_text[:, :, None] * b_v, axis=1) + tl.sum(b_summary[:, :, None] * b_vs, axis=1)
            p_head, m_head = _rows(p_out, i_b, i_g * GROUP + i_r, o_c * S + i_s, m_c, o_d, out_b, out_n, out_h, D)
            tl.store(p_head, b_out.to(p_out.dtype.element_ty), mask=m_head)


@triton.jit
def _summary_backward_kernel(
    p_q, p_k, p_v, p_ks, p_vs, p_start, p_do, p_dq, p_dk, p_dv, p_dks, p_dvs,
    chunks, key_start, scale, scale_log2, groups, stride_start,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, ks_b, ks_n, ks_h, vs_b, vs_n, vs_h, do_b, do_n, do_h,
    dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, dks_b, dks_n, dks_h, dvs_b, dvs_n, dvs_h,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BC: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """All gradients of the summary queries of BC chunks; ACCUMULATE adds to the gradients of keys and values."""
    i_b = tl.program_id(1) // groups
    i_g = tl.program_id(1) % groups
    o_d = tl.arange(0, BD)
    o_c, m_c, o_text, m_text, m_seen, o_summary, m_summary = _chunk_offsets(
        p_start, tl.program_id(0), i_b, chunks, key_start, stride_start, C, S, BC, CP, SP, HAS_DOCUMENTS
    )
    # [BC, CP, BD] and [BC, SP, BD]
    b_k = _load(p_k, i_b, i_g, o_text, m_text, o_d, k_b, k_n, k_h, D)
    b_v = _load(p_v, i_b, i_g, o_text, m_text, o_d, v_b, v_n, v_h, D)
    b_ks = _load(p_ks, i_b, i_g, o_summary, m_summary, o_d, ks_b, ks_n, ks_h, D)
    b_vs = _load(p_vs, i_b, i_g, o_summary, m_summary, o_d, vs_b, vs_n, vs_h, D)
    b_dk = tl.zeros([BC, CP, BD], dtype=tl.float32)
    b_dv = tl.zeros([BC, CP, BD], dtype=tl.float32)
    b_dks = tl.zeros([BC, SP, BD], dtype=tl.float32)
    b_dvs = tl.zeros([BC, SP, BD], dtype=tl.float32)
    for i_r in range(0, GROUP):
        for i_s in range(0, S):
            # [BC, BD]
            b_q = _load(p_q, i_b, i_g * GROUP + i_r, o_c * S + i_s, m_c, o_d, q_b, q_n, q_h, D).to(tl.float32)
            b_do = _load(p_do, i_b, i_g * GROUP + i_r, o_c * S + i_s, m_c, o_d, do_b, do_n, do_h, D).to(tl.float32)
            # [BC, CP] and [BC, SP]
            b_text, b_summary = _probabilities(b_q, b_k, b_ks, m_seen, i_s, scale_log2, SP)
            b_dtext = tl.sum(b_do[:, None, :] * b_v, axis=2)
            b_dsummary = tl.sum(b_do[:, None, :] * b_vs, axis=2)
            # [BC]
            b_delta = tl.sum(b_text * b_dtext, axis=1) + tl.sum(b_summary * b_dsummary, axis=1)
            b_dtext = b_text * (b_dtext - b_delta[:, None]) * scale
            b_dsummary = b_summary * (b_dsummary - b_delta[:, None]) * scale
            # [BC, BD]
            b_dq = tl.sum(b_dtext[:, :, None] * b_k, axis=1) + tl.sum(b_dsummary[:, :, None] * b_ks, axis=1)
            p_head, m_head = _rows(p_dq, i_b, i_g * GROUP + i_r, o_c * S + i_s, m_c, o_d, dq_b, dq_n, dq_h, D)
            tl.store(p_head, b_dq.to(p_dq.dtype.element_ty), mask=m_head)
            # [BC, CP, BD] and [BC, SP, BD]
            b_dk += b_dtext[:, :, None] * b_q[:, None, :]
            b_dv += b_text[:, :, None] * b_do[:, None, :]
            b_dks += b_dsummary[:, :, None] * b_q[:, None, :]
            b_dvs += b_summary[:, :, None] * b_do[:, None, :]
    _write(p_dk, b_dk, i_b, i_g, o_text, m_text, o_d, dk_b, dk_n, dk_h, D, ACCUMULATE)
    _write(p_dv, b_dv, i_b, i_g, o_text, m_text, o_d, dv_b, dv_n, dv_h, D, ACCUMULATE)
    _write(p_dks, b_dks, i_b, i_g, o_summary, m_summary, o_d, dks_b, dks_n, dks_h, D, ACCUMULATE)
    _write(p_dvs, b_dvs, i_b, i_g, o_summary, m_summary, o_d, dvs_b, dvs_n, dvs_h, D, ACCUMULATE)


@triton.jit
def _write(p, b, i_b, i_g, o_n, m_n, o_d, stride_b, stride_n, stride_h, D: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Store gradients of keys or values, added to what is there if ACCUMULATE."""
    p_rows, m_rows = _rows(p, i_b, i_g, o_n, m_n, o_d, stride_b, stride_n, stride_h, D)
    if ACCUMULATE:
        b += tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)
    tl.store(p_rows, b.to(p.dtype.element_ty), mask=m_rows)


def _shape(rows: Rows, sizes: Sizes) -> tuple[tuple[int, int], dict[str, int | bool], int, int]:
    """Grid and compile-time numbers of both kernels, chunks, and the stride of document_start."""
    q, k, *_, document_start = rows
    dim, groups = q.shape[-1], k.shape[2]
    chunks = q.shape[1] // sizes.summary_tokens
    padded = {"BD": triton.next_power_of_2(dim), "CP": triton.next_power_of_2(sizes.chunk_size)}
    block = max(1, BLOCK_ELEMENTS // (padded["BD"] * padded["CP"]))
    constants = {
        "C": sizes.chunk_size, "S": sizes.summary_tokens, "GROUP": q.shape[2] // groups, "D": dim, **padded,
        "BC": block, "SP": triton.next_power_of_2(sizes.summary_tokens), "HAS_DOCUMENTS": document_start is not None,
    }  # fmt: skip
    stride = 0 if document_start is None else document_start.stride(0)
    return (triton.cdiv(chunks, block), q.shape[0] * groups), constants, chunks, stride


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for rows in tensors for stride in rows.stride()[:3]]


def launch_summary_forward(rows: Rows, sizes: Sizes, out: Tensor) -> None:
    """Fill out [B, nc * S, Hq, D] of the summary queries in `rows`."""
    q, k = rows.q, rows.k
    if not q.shape[1]:
        return
    grid, constants, chunks, stride = _shape(rows, sizes)
    launch(
        _summary_forward_kernel, grid,
        *rows, out, chunks, sizes.key_start, sizes.softmax_scale * LOG2E, k.shape[2], stride,
        *_strides(*rows[:5], out), **constants, num_warps=4,
    )  # fmt: skip


def launch_summary_backward(rows: Rows, sizes: Sizes, d_out: Tensor, gradients: Gradients, accumulate: bool) -> None:
    """Fill the five gradients of the summary queries in `rows`, or fill dq and add to the four of keys and values."""
    q, k = rows.q, rows.k
    if not q.shape[1]:
        return
    grid, constants, chunks, stride = _shape(rows, sizes)
    launch(
        _summary_backward_kernel, grid,
        *rows, d_out, *gradients, chunks, sizes.key_start, sizes.softmax_scale, sizes.softmax_scale * LOG2E,
        k.shape[2], stride, *_strides(*rows[:5], d_out, *gradients), **constants, ACCUMULATE=accumulate, num_warps=4,
    )  # fmt: skip


def _last_contiguous(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@repeatable
def _launch_forward(rows: Rows, outputs: tuple[Tensor], sizes: Sizes) -> None:
    launch_summary_forward(rows, sizes, *outputs)


@repeatable
def _launch_backward(rows: Rows, d_outputs: tuple[Tensor], gradients: Gradients, sizes: Sizes) -> None:
    launch_summary_backward(rows, sizes, *d_outputs, gradients, accumulate=False)


def _sizes(chunk_size: int, summary_tokens: int, key_start: int, softmax_scale: float) -> Sizes:
    """Sizes of a call; summary queries have no window, and no places but that of their text."""
    return Sizes(chunk_size, summary_tokens, 0, 0, key_start, 0, softmax_scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, key_start: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    outputs = new_like(q)
    rows = Rows(*(_last_contiguous(t) for t in (q, k, v, k_summary, v_summary)), document_start)
    _launch_forward(rows, outputs, _sizes(chunk_size, summary_tokens, key_start, softmax_scale))
    return outputs[0]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, key_start: int, softmax_scale: float, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(*(_last_contiguous(t) for t in (q, k, v, k_summary, v_summary)), document_start)
    gradients = Gradients(*new_like(*rows[:5]))
    sizes = _sizes(chunk_size, summary_tokens, key_start, softmax_scale)
    _launch_backward(rows, (_last_contiguous(d_out),), gradients, sizes)
    return tuple(gradients)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _gradients(ctx, backward, d_out: Tensor):
    gradients = backward(*ctx.saved_tensors, *ctx.settings, d_out)
    return *gradients, *[None] * (1 + len(ctx.settings))


_summary_attention = differentiable(
    "summary_attention", _forward, _backward, save=_save, gradients=_gradients,
    fake=lambda q, *rest: new_like(q)[0], fake_backward=lambda *inputs: new_like(*inputs[:5]),
)  # fmt: skip


def summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    geometry: KSAGeometry,
    *,
    document_start: Tensor | None = None,
    key_start: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of summary queries over the C text tokens of their chunk and its summaries up to themselves.

    Arguments and result as in `reference.summary_attention`, for bfloat16, float16 and float32.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have.
    """
    scale = check_rows(q, (k, v, k_summary, v_summary), softmax_scale)
    return _summary_attention(
        q, k, v, k_summary, v_summary, row_starts(document_start, q.shape[0]), geometry.chunk_size,
        geometry.summary_tokens, key_start, scale,
    )  # fmt: skip
