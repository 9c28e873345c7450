"""Forward pass of the text queries of KSA attention: text in the window, then older summaries, in one softmax."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.operands import Rows, Sizes, SummaryForward, TextOutputs
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, descriptor, key_interval, tile_ranges
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.launch import launch


@triton.jit
def _attend(
    b_acc, b_sum, b_max, b_q, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2, begin, end, gap_at, gap,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [begin, end), where tiles from gap_at on are `gap` tiles further on."""
    for tile in range(begin, end):
        o_n = tile * BN
        if MASKED:
            o_n += tl.where(tile >= gap_at, gap, 0) * BN
        # [BN, BD]
        b_k = d_k.load([i_b, i_g, o_n, 0]).reshape(BN, BD)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            o_key = o_n + tl.arange(0, BN)
            b_s = tl.where((o_key >= b_lower[:, None]) & (o_key < b_upper[:, None]), b_s, float("-inf"))
        # [BM]
        b_next = tl.maximum(b_max, tl.max(b_s, axis=1) * scale_log2)
        b_p = tl.math.exp2(b_s * scale_log2 - b_next[:, None])
        b_decay = tl.math.exp2(b_max - b_next)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_decay[:, None]
        # [BN, BD]
        b_v = d_v.load([i_b, i_g, o_n, 0]).reshape(BN, BD)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_next
    return b_acc, b_sum, b_max


@triton.jit
def _attend_phase(
    b_acc, b_sum, b_max, b_q, d_k, d_v, i_b, i_g, o_i, b_start, first_query, last_query, first_start, last_start,
    offset, num_keys, window, scale_log2,
    C: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, IS_TEXT: tl.constexpr,
):  # fmt: skip
    """All keys of one kind: the tiles at both ends of the interval with a mask, those between without."""
    # [BM]
    b_lower, b_upper = key_interval(o_i, b_start, offset, num_keys, window, C, S, IS_TEXT)
    lower, full_upper = key_interval(first_query, first_start, offset, num_keys, window, C, S, IS_TEXT)
    full_lower, upper = key_interval(last_query, last_start, offset, num_keys, window, C, S, IS_TEXT)
    first, full_first, full_stop, stop = tile_ranges(lower, full_lower, full_upper, upper, BN)
    full = full_stop - full_first
    b_acc, b_sum, b_max = _attend(
        b_acc, b_sum, b_max, b_q, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2,
        full_first, full_stop, 0, 0, BM, BN, BD, False,
    )  # fmt: skip
    return _attend(
        b_acc, b_sum, b_max, b_q, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2,
        first, stop - full, full_first, full, BM, BN, BD, True,
    )  # fmt: skip


@triton.jit
def _forward_kernel(
    d_q, d_k, d_v, d_ks, d_vs, p_start, p_out, p_lse,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2, heads,
    stride_start, stride_ob, stride_on, stride_oh,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * Q K^T) V and lse for one tile of queries of one head; the longest tiles go first."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b = tl.program_id(1) // heads
    i_h = tl.program_id(1) % heads
    i_g = i_h // GROUP
    # [BM]
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < nq
    first_query = query_start + i_m * BM
    last_query = query_start + tl.minimum(i_m * BM + BM, nq) - 1
    if HAS_DOCUMENTS:
        p_start += i_b.to(tl.int64) * stride_start
        b_start = tl.load(p_start + query_start + o_m, mask=m_m, other=0)
        first_start = tl.load(p_start + first_query)
        last_start = tl.load(p_start + last_query)
    else:
        b_start = tl.zeros([BM], dtype=tl.int32)
        first_start = 0
        last_start = 0
    o_i = query_start + o_m

    # [BM, BD]
    b_q = d_q.load([i_b, i_h, i_m * BM, 0]).reshape(BM, BD)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    # A finite start makes rows that see nothing come out as sum 0 without a special case.
    b_max = tl.full([BM], -1.0e30, dtype=tl.float32)
    b_acc, b_sum, b_max = _attend_phase(
        b_acc, b_sum, b_max, b_q, d_k, d_v, i_b, i_g, o_i, b_start, first_query, last_query, first_start, last_start,
        key_start, nk, window, scale_log2, C, S, BM, BN, BD, True,
    )  # fmt: skip
    b_acc, b_sum, b_max = _attend_phase(
        b_acc, b_sum, b_max, b_q, d_ks, d_vs, i_b, i_g, o_i, b_start, first_query, last_query, first_start, last_start,
        chunk_start, ns, window, scale_log2, C, S, BM, BN, BD, False,
    )  # fmt: skip

    m_seen = b_sum > 0
    b_safe = tl.where(m_seen, b_sum, 1.0)
    b_acc = b_acc / b_safe[:, None]
    b_lse = tl.where(m_seen, (b_max + tl.math.log2(b_safe)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + tl.program_id(1).to(tl.int64) * nq + o_m, b_lse, mask=m_m)
    o_d = tl.arange(0, BD)
    p_out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    # [BM, BD]
    p_rows = p_out + o_m[:, None].to(tl.int64) * stride_on + o_d[None, :]
    tl.store(p_rows, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


def launch_forward(
    rows: Rows, sizes: Sizes, tile: Tile, outputs: TextOutputs, dealt: Tensor, summary: SummaryForward | None = None
) -> None:
    """Fill the outputs of the text queries, and that of the summary queries where they are given.

    Args:
        dealt: int32 [1], 0: counts the work items that are dealt (specialised tiles).
        summary: for specialised tiles, where all offsets are 0, keys of text and summaries have equal strides, and
            the summary queries and their output have the strides of q and out.
    """
    if tile.specialised:
        from megatron_ksa.kernels.ksa_attention import gluon_forward

        gluon_forward.launch_forward(rows, sizes, tile, outputs, dealt, summary)
        return
    q, *keys, document_start = rows
    out, lse = outputs
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    block_dim = padded_head_dim(dim)
    d_q = descriptor(q, tile.queries, block_dim)
    # A tensor descriptor needs rows: where there are no text keys or no summaries, it is made of the queries' memory,
    # which the kernel then does not read.
    d_keys = [descriptor(kind if kind.shape[1] else q, tile.keys, block_dim) for kind in keys]
    launch(
        _forward_kernel, (triton.cdiv(nq, tile.queries), batch * heads),
        d_q, *d_keys, document_start, out, lse,
        nq, rows.k.shape[1], rows.k_summary.shape[1], sizes.query_start, sizes.key_start, sizes.chunk_start,
        sizes.window, sizes.softmax_scale * LOG2E, heads,
        document_start.stride(0) if document_start is not None else 0, *out.stride()[:3],
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=heads // rows.k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, HAS_DOCUMENTS=document_start is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
