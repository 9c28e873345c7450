"""dQ of `triton_backward` in Gluon for Hopper: the product dS K of one key tile runs while the next dS is computed."""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from megatron_ksa.kernels.ksa_attention.gluon_common import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    WARPS,
    descriptor,
    key_tiles,
    load_keys,
    masked_scores,
    ring,
)
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, key_interval
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim


@gluon.jit
def _ds(
    b_s, b_dp, b_lse2, b_delta, scale_log2, tile, num_text, text_tiles, summary_tiles,
    b_text_lower, b_text_upper, b_summary_lower, b_summary_upper, BN: gl.constexpr,
):  # fmt: skip
    """dS = P * (dP - delta) of one tile."""
    b_s = masked_scores(
        b_s, tile, num_text, text_tiles, summary_tiles, b_text_lower, b_text_upper, b_summary_lower, b_summary_upper, BN
    )
    return gl.exp2(b_s * scale_log2 - b_lse2[:, None]) * (b_dp - b_delta[:, None])


@gluon.jit
def _consume(
    s_q, s_out, s_do, rows_full, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq, o_row, i_b,
    k_full, v_full, k_empty, v_empty, s_k, s_v, num_text, total, text_tiles, summary_tiles,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, stride_start, stride_n,
    PART: gl.constexpr, C: gl.constexpr, S: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dQ of rows [o_row, o_row + BM) from every key tile; also delta, and lse to base 2."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, output)
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    dtype: gl.constexpr = s_q.dtype
    # [BM]
    o_m = o_row + gl.arange(0, BM, layout=rows)
    m_m = o_m < nq
    if HAS_DOCUMENTS:
        b_start = gl.load(p_start + i_b.to(gl.int64) * stride_start + query_start + o_m, mask=m_m, other=0)
    else:
        b_start = gl.zeros([BM], gl.int32, layout=rows)
    o_i = query_start + o_m
    b_text_lower, b_text_upper = key_interval(o_i, b_start, key_start, nk, window, C, S, True)
    b_summary_lower, b_summary_upper = key_interval(o_i, b_start, chunk_start, ns, window, C, S, False)

    mbarrier.wait(rows_full.index(PART), 0)
    b_out = s_out.index(PART).reshape([BM, BD]).load(output).to(gl.float32)
    b_delta = gl.sum(b_out * s_do.index(PART).reshape([BM, BD]).load(output).to(gl.float32), axis=1)
    b_delta = gl.convert_layout(b_delta, rows)
    if HAS_DLSE:
        b_delta -= gl.load(p_dlse + o_m, mask=m_m, other=0.0)
    gl.store(p_delta + o_m, b_delta, mask=m_m)
    b_lse2 = gl.load(p_lse + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
    gl.store(p_lse2 + o_m, b_lse2, mask=m_m)
    # Rows that see nothing, and rows beyond nq, get probability exp(-inf) = 0.
    b_lse2 = gl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
    # [BM, BD]
    b_q = s_q.index(PART).reshape([BM, BD]).load(left)
    b_do = s_do.index(PART).reshape([BM, BD]).load(left)
    b_dq = gl.zeros([BM, BD], gl.float32, layout=output)
    b_zero = gl.zeros([BM, BN], gl.float32, layout=scores)
    if total > 0:
        mbarrier.wait(k_full.index(0), 0)
        b_s = warpgroup_mma(b_q, s_k.index(0).reshape([BN, BD]).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(0), 0)
        b_dp = warpgroup_mma(b_do, s_v.index(0).reshape([BN, BD]).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
        mbarrier.arrive(v_empty.index(0), count=1)
        b_ds = _ds(
            b_s, b_dp, b_lse2, b_delta, scale_log2, 0, num_text, text_tiles, summary_tiles,
            b_text_lower, b_text_upper, b_summary_lower, b_summary_upper, BN,
        )  # fmt: skip
        b_left = gl.convert_layout(b_ds.to(dtype), gl.DotOperandLayout(0, output, 2))
        for tile in range(1, total):
            slot = tile % STAGES
            phase = (tile // STAGES) & 1
            before = (tile - 1) % STAGES
            # [BM, BN]
            mbarrier.wait(k_full.index(slot), phase)
            b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            b_values = s_v.index(slot).reshape([BN, BD]).permute((1, 0))
            b_dp = warpgroup_mma(b_do, b_values, b_zero, use_acc=False, is_async=True)
            b_dq = warpgroup_mma(b_left, s_k.index(before).reshape([BN, BD]), b_dq, is_async=True)
            b_s, b_dp = warpgroup_mma_wait(1, deps=(b_s, b_dp))
            mbarrier.arrive(v_empty.index(slot), count=1)
            b_ds = _ds(
                b_s, b_dp, b_lse2, b_delta, scale_log2, tile, num_text, text_tiles, summary_tiles,
                b_text_lower, b_text_upper, b_summary_lower, b_summary_upper, BN,
            )  # fmt: skip
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            mbarrier.arrive(k_empty.index(before), count=1)
            b_left = gl.convert_layout(b_ds.to(dtype), gl.DotOperandLayout(0, output, 2))
        b_dq = warpgroup_mma(b_left, s_k.index((total - 1) % STAGES).reshape([BN, BD]), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    o_out = o_row + gl.arange(0, BM, layout=out_rows)
    o_d = gl.arange(0, BD, layout=gl.SliceLayout(0, output))
    # [BM, BD]
    p_rows = p_dq + o_out[:, None].to(gl.int64) * stride_n + o_d[None, :]
    gl.store(p_rows, (b_dq * scale).to(dtype), mask=(o_out < nq)[:, None] & (o_d < D)[None, :])


@gluon.jit
def _dq_kernel(
    d_q, d_out, d_do, d_k, d_v, d_ks, d_vs, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, heads,
    stride_start, stride_statistics, stride_b, stride_n, stride_h,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ of two tiles of BM queries of one head; also writes delta, and lse to base 2, for the dK/dV kernel."""
    i_m = (gl.num_programs(0) - 1 - gl.program_id(0)) * 2 * BM
    i_b = gl.program_id(1) // heads
    i_h = gl.program_id(1) % heads
    i_g = i_h // GROUP
    first_query = query_start + i_m
    last_query = query_start + gl.minimum(i_m + 2 * BM, nq) - 1
    if HAS_DOCUMENTS:
        first_start = gl.load(p_start + i_b.to(gl.int64) * stride_start + first_query)
        last_start = gl.load(p_start + i_b.to(gl.int64) * stride_start + last_query)
    else:
        first_start = 0
        last_start = 0
    text_tiles, summary_tiles = key_tiles(
        first_query, last_query, first_start, last_start, nk, ns, key_start, chunk_start, window, C, S, BN
    )
    num_text = text_tiles[3] - text_tiles[0]
    total = num_text + summary_tiles[3] - summary_tiles[0]

    s_q = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_out = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_do = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full, k_empty = ring(STAGES, 2)
    v_full, v_empty = ring(STAGES, 2)
    for part in gl.static_range(2):
        mbarrier.init(rows_full.index(part), count=1)
    for part in gl.static_range(2):
        bar = rows_full.index(part)
        mbarrier.expect(bar, 3 * d_q.block_type.nbytes)
        tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
        tma.async_copy_global_to_shared(d_out, [i_b, i_h, i_m + part * BM, 0], bar, s_out.index(part))
        tma.async_copy_global_to_shared(d_do, [i_b, i_h, i_m + part * BM, 0], bar, s_do.index(part))
    i_bh = gl.program_id(1).to(gl.int64)
    p_lse += i_bh * nq
    if HAS_DLSE:
        p_dlse += i_bh * nq
    p_lse2 += i_bh * stride_statistics
    p_delta += i_bh * stride_statistics
    p_dq += i_b.to(gl.int64) * stride_b + i_h.to(gl.int64) * stride_h
    gl.warp_specialize(
        [
            (_consume, (
                s_q, s_out, s_do, rows_full, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq, i_m, i_b,
                k_full, v_full, k_empty, v_empty, s_k, s_v, num_text, total, text_tiles, summary_tiles,
                nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, stride_start, stride_n,
                0, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS, HAS_DLSE,
            )),
            (_consume, (
                s_q, s_out, s_do, rows_full, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq, i_m + BM, i_b,
                k_full, v_full, k_empty, v_empty, s_k, s_v, num_text, total, text_tiles, summary_tiles,
                nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, stride_start, stride_n,
                1, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS, HAS_DLSE,
            )),
            (load_keys, (
                d_k, d_v, d_ks, d_vs, i_b, i_g, num_text, text_tiles[0], summary_tiles[0], total,
                k_full, v_full, k_empty, v_empty, s_k, s_v, BN, STAGES,
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tile: Tile, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    lse2: Tensor, delta: Tensor, dq: Tensor,
) -> None:  # fmt: skip
    """As `triton_backward.launch_dq`, for bfloat16 and float16."""
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    nk, ns = k.shape[1], k_summary.shape[1]
    block_dim = padded_head_dim(dim)
    _dq_kernel[(triton.cdiv(nq, 2 * tile.queries), batch * heads)](
        *(descriptor(rows, tile.queries, block_dim) for rows in (q, out, d_out)),
        *(descriptor(rows if rows.shape[1] else q, tile.keys, block_dim) for rows in (k, v, k_summary, v_summary)),
        document_start, lse, d_lse, lse2, delta, dq,
        nq, nk, ns, query_start, key_start, chunk_start, window, softmax_scale, softmax_scale * LOG2E, heads,
        document_start.stride(0) if document_start is not None else 0, delta.stride(1), *dq.stride()[:3],
        C=chunk_size, S=summary_tokens, GROUP=heads // k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, HAS_DOCUMENTS=document_start is not None,
        HAS_DLSE=d_lse is not None, num_warps=WARPS.value,
    )  # fmt: skip
