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
    barriers,
    deal,
    descriptor,
    following,
    free_phase,
    key_tiles,
    load_keys,
    masked_scores,
    programs,
    query_item,
    queue,
    row_intervals,
    take,
)
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.launch import launch

# Heads whose tiles are dealt together: their keys share the L2 cache.
TOGETHER = 2


@gluon.jit
def _load(
    d_rows, d_keys, s_rows, rows_full, rows_empty, ring, items, p_dealt, p_start, stride_start, sizes, schedule, heads,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The producer: queries, outputs and dO of a work item, then the key tiles that the queries see."""
    d_q, d_out, d_do = d_rows
    s_q, s_out, s_do = s_rows
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < schedule[0] * schedule[1]:
        deal(item, turn, items)
        i_m, i_bh = query_item(item, schedule, BM)
        i_b, i_h = i_bh // heads, i_bh % heads
        num_text, total, text_tiles, summary_tiles = key_tiles(
            i_m, i_b, p_start, stride_start, sizes, C, S, BM, BN, HAS_DOCUMENTS
        )
        for part in gl.static_range(2):
            bar = rows_full.index(part)
            mbarrier.wait(rows_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, 3 * d_q.block_type.nbytes)
            tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
            tma.async_copy_global_to_shared(d_out, [i_b, i_h, i_m + part * BM, 0], bar, s_out.index(part))
            tma.async_copy_global_to_shared(d_do, [i_b, i_h, i_m + part * BM, 0], bar, s_do.index(part))
        after = following(p_dealt)
        step = load_keys(
            d_keys, i_b, i_h // GROUP, num_text, total, text_tiles, summary_tiles, ring, step, BN, STAGES
        )
        turn += 1
        item = after
    deal(item, turn, items)


@gluon.jit
def _ds(
    b_s, b_dp, b_lse2, b_delta, scale_log2, tile, num_text, text_tiles, summary_tiles, text, summary, BN: gl.constexpr
):  # fmt: skip
    """dS = P * (dP - delta) of one tile."""
    b_s = masked_scores(b_s, tile, num_text, text_tiles, summary_tiles, text, summary, BN)
    return gl.exp2(b_s * scale_log2 - b_lse2[:, None]) * (b_dp - b_delta[:, None])


@gluon.jit
def _consume(
    s_rows, rows_full, rows_empty, ring, items, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    stride_start, stride_statistics, stride_b, stride_n, stride_h, sizes, schedule, heads, scale, scale_log2,
    PART: gl.constexpr, C: gl.constexpr, S: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dQ of BM queries of every work item; also delta, and lse to base 2."""
    s_q, s_out, s_do = s_rows
    k_full, v_full, k_empty, v_empty, s_k, s_v = ring
    nq = sizes[0]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, output)
    operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    left: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    dtype: gl.constexpr = s_q.dtype
    b_zero = gl.zeros([BM, BN], gl.float32, layout=scores)
    # Key tiles of earlier work items.
    before = 0
    turn = 0
    item = take(turn, items)
    while item < schedule[0] * schedule[1]:
        i_m, i_bh = query_item(item, schedule, BM)
        i_b = i_bh // heads
        num_text, total, text_tiles, summary_tiles = key_tiles(
            i_m, i_b, p_start, stride_start, sizes, C, S, BM, BN, HAS_DOCUMENTS
        )
        # [BM]
        o_m = i_m + PART * BM + gl.arange(0, BM, layout=rows)
        m_m = o_m < nq
        text, summary = row_intervals(o_m, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
        i_row = i_bh.to(gl.int64) * nq
        i_statistics = i_bh.to(gl.int64) * stride_statistics
        b_lse2 = gl.load(p_lse + i_row + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
        gl.store(p_lse2 + i_statistics + o_m, b_lse2, mask=m_m)
        # Rows that see nothing, and rows beyond nq, get probability exp(-inf) = 0.
        b_lse2 = gl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
        mbarrier.wait(rows_full.index(PART), turn & 1)
        b_out = s_out.index(PART).reshape([BM, BD]).load(output).to(gl.float32)
        b_delta = gl.sum(b_out * s_do.index(PART).reshape([BM, BD]).load(output).to(gl.float32), axis=1)
        b_delta = gl.convert_layout(b_delta, rows)
        if HAS_DLSE:
            b_delta -= gl.load(p_dlse + i_row + o_m, mask=m_m, other=0.0)
        gl.store(p_delta + i_statistics + o_m, b_delta, mask=m_m)
        # [BM, BD]
        b_dq = gl.zeros([BM, BD], gl.float32, layout=output)
        if total > 0:
            b_q = s_q.index(PART).reshape([BM, BD]).load(operand)
            b_do = s_do.index(PART).reshape([BM, BD]).load(operand)
            slot = before % STAGES
            phase = (before // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            b_values = s_v.index(slot).reshape([BN, BD]).permute((1, 0))
            b_dp = warpgroup_mma(b_do, b_values, b_zero, use_acc=False, is_async=True)
            b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
            mbarrier.arrive(v_empty.index(slot), count=1)
            # Not before products have used them: a barrier waits for no load, and the copy engine for no warp.
            mbarrier.arrive(rows_empty.index(PART), count=1)
            b_ds = _ds(
                b_s, b_dp, b_lse2, b_delta, scale_log2, 0, num_text, text_tiles, summary_tiles, text, summary, BN
            )
            b_left = gl.convert_layout(b_ds.to(dtype), left)
            for tile in range(1, total):
                last = slot
                slot = (before + tile) % STAGES
                phase = ((before + tile) // STAGES) & 1
                # [BM, BN]
                mbarrier.wait(k_full.index(slot), phase)
                b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
                b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(slot), phase)
                b_values = s_v.index(slot).reshape([BN, BD]).permute((1, 0))
                b_dp = warpgroup_mma(b_do, b_values, b_zero, use_acc=False, is_async=True)
                b_dq = warpgroup_mma(b_left, s_k.index(last).reshape([BN, BD]), b_dq, is_async=True)
                b_s, b_dp = warpgroup_mma_wait(1, deps=(b_s, b_dp))
                mbarrier.arrive(v_empty.index(slot), count=1)
                b_ds = _ds(
                    b_s, b_dp, b_lse2, b_delta, scale_log2, tile, num_text, text_tiles, summary_tiles, text, summary,
                    BN,
                )  # fmt: skip
                b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
                mbarrier.arrive(k_empty.index(last), count=1)
                b_left = gl.convert_layout(b_ds.to(dtype), left)
            b_dq = warpgroup_mma(b_left, s_k.index(slot).reshape([BN, BD]), b_dq, is_async=True)
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            mbarrier.arrive(k_empty.index(slot), count=1)
        else:
            mbarrier.arrive(rows_empty.index(PART), count=1)
        before += total
        o_out = i_m + PART * BM + gl.arange(0, BM, layout=out_rows)
        o_d = gl.arange(0, BD, layout=gl.SliceLayout(0, output))
        # [BM, BD]
        o_head = i_b.to(gl.int64) * stride_b + (i_bh % heads).to(gl.int64) * stride_h
        p_rows = p_dq + o_head + o_out[:, None].to(gl.int64) * stride_n + o_d[None, :]
        gl.store(p_rows, (b_dq * scale).to(dtype), mask=(o_out < nq)[:, None] & (o_d < D)[None, :])
        turn += 1
        item = take(turn, items)


@gluon.jit
def _dq_kernel(
    d_q, d_out, d_do, d_k, d_v, d_ks, d_vs, p_dealt, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, heads, tiles, all_heads, together,
    stride_start, stride_statistics, stride_b, stride_n, stride_h,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, delta and lse to base 2 (for the dK/dV kernel); a work item is two tiles of BM queries of one head."""
    s_q = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_out = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_do = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    rows_full, rows_empty = barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    s_rows = (s_q, s_out, s_do)
    items = queue(2)
    ring = (k_full, v_full, k_empty, v_empty, s_k, s_v)
    sizes = (nq, nk, ns, query_start, key_start, chunk_start, window)
    schedule = (tiles, all_heads, together)
    gl.warp_specialize(
        [
            (_consume, (
                s_rows, rows_full, rows_empty, ring, items, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
                stride_start, stride_statistics, stride_b, stride_n, stride_h, sizes, schedule, heads, scale,
                scale_log2, 0, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS, HAS_DLSE,
            )),
            (_consume, (
                s_rows, rows_full, rows_empty, ring, items, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
                stride_start, stride_statistics, stride_b, stride_n, stride_h, sizes, schedule, heads, scale,
                scale_log2, 1, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS, HAS_DLSE,
            )),
            (_load, (
                (d_q, d_out, d_do), (d_k, d_v, d_ks, d_vs), s_rows, rows_full, rows_empty, ring, items, p_dealt,
                p_start, stride_start, sizes, schedule, heads, C, S, GROUP, BM, BN, STAGES, HAS_DOCUMENTS,
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tile: Tile, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    lse2: Tensor, delta: Tensor, dq: Tensor, dealt: Tensor,
) -> None:  # fmt: skip
    """As `triton_backward.launch_dq`, for bfloat16 and float16."""
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    nk, ns = k.shape[1], k_summary.shape[1]
    block_dim = padded_head_dim(dim)
    tiles = triton.cdiv(nq, 2 * tile.queries)
    launch(
        _dq_kernel, (programs(tiles * batch * heads, q.device),),
        *(descriptor(rows, tile.queries, block_dim) for rows in (q, out, d_out)),
        *(descriptor(rows if rows.shape[1] else q, tile.keys, block_dim) for rows in (k, v, k_summary, v_summary)),
        dealt, document_start, lse, d_lse, lse2, delta, dq,
        nq, nk, ns, query_start, key_start, chunk_start, window, softmax_scale, softmax_scale * LOG2E, heads,
        tiles, batch * heads, TOGETHER,
        document_start.stride(0) if document_start is not None else 0, delta.stride(1), *dq.stride()[:3],
        C=chunk_size, S=summary_tokens, GROUP=heads // k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, HAS_DOCUMENTS=document_start is not None,
        HAS_DLSE=d_lse is not None, num_warps=WARPS.value,
    )  # fmt: skip
