"""dQ of `triton_backward` in Gluon for Hopper: the product dS K of one key tile runs while the next dS is computed.

The summaries' own queries come last in a work item (`gluon_own`).
"""

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
    consumer_item,
    deal,
    descriptor,
    following,
    free_phase,
    key_tiles,
    keys_seen,
    load_keys,
    masked_scores,
    pass_over,
    programs,
    query_item,
    queue,
    store_rows,
    take,
)
from megatron_ksa.kernels.ksa_attention.gluon_own import chunk_keys, load_own, own_dq
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.ksa_attention.workspace import Workspace
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
        total, _, _, order = key_tiles(i_m, i_b, p_start, stride_start, sizes, C, S, BM, BN, HAS_DOCUMENTS)
        for part in gl.static_range(2):
            bar = rows_full.index(part)
            mbarrier.wait(rows_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, 3 * d_q.block_type.nbytes)
            tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
            tma.async_copy_global_to_shared(d_out, [i_b, i_h, i_m + part * BM, 0], bar, s_out.index(part))
            tma.async_copy_global_to_shared(d_do, [i_b, i_h, i_m + part * BM, 0], bar, s_do.index(part))
        after = following(p_dealt)
        step = load_keys(d_keys, i_b, i_h // GROUP, total, order, ring, step, BN, STAGES)
        turn += 1
        item = after
    deal(item, turn, items)


@gluon.jit
def _ds(b_s, b_dp, b_lse2, b_delta, scale_log2, tile, order, seen, BN: gl.constexpr):
    """dS = P * (dP - delta) of one tile."""
    b_s = masked_scores(b_s, tile, order, seen, BN)
    return gl.exp2(b_s * scale_log2 - b_lse2[:, None]) * (b_dp - b_delta[:, None])


@gluon.jit
def _products(b_q, b_do, b_zero, ring, step, STAGES: gl.constexpr):
    """Scores and dP of a step's key tile, [BM, BN] each, in flight."""
    k_full, v_full, _, _, s_k, s_v = ring
    BN: gl.constexpr = b_zero.shape[1]
    BD: gl.constexpr = b_q.shape[1]
    slot = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_full.index(slot), phase)
    b_s = warpgroup_mma(b_q, s_k.index(slot).reshape([BN, BD]).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    b_dp = warpgroup_mma(b_do, s_v.index(slot).reshape([BN, BD]).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    return b_s, b_dp


@gluon.jit
def _consume(
    s_dq, s_rows, rows_full, rows_empty, ring, items, own, own_queries, own_results, p_start, p_lse, p_dlse, p_lse2,
    p_delta, p_dq, stride_start, stride_statistics, dq_strides, sizes, schedule, heads, scale, scale_log2,
    PART: gl.constexpr, C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dQ of BM queries of every work item; also delta, and lse to base 2."""
    s_q, s_out, s_do = s_rows
    _, _, k_empty, v_empty, s_k, s_v = ring
    nq = sizes[0]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    left: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    dtype: gl.constexpr = s_q.dtype
    b_zero = gl.zeros([BM, BN], gl.float32, layout=scores)
    # Steps of the ring in earlier work items.
    before = 0
    turn = 0
    item = take(turn, items)
    while item < schedule[0] * schedule[1]:
        i_bh, first, total, begin, end, order = consumer_item(
            item, schedule, heads, p_start, stride_start, sizes, PART, C, S, BM, BN, HAS_DOCUMENTS
        )
        i_b, i_h = i_bh // heads, i_bh % heads
        # [BM]
        o_m = first + gl.arange(0, BM, layout=rows)
        m_m = o_m < nq
        seen = keys_seen(o_m, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
        i_row = i_bh.to(gl.int64) * nq
        i_statistics = i_bh.to(gl.int64) * stride_statistics
        b_lse2 = gl.load(p_lse + i_row + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
        gl.store(p_lse2 + i_statistics + o_m, b_lse2, mask=m_m)
        # Rows that see nothing, and rows beyond nq, get probability exp(-inf) = 0.
        b_lse2 = gl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
        mbarrier.wait(rows_full.index(PART), turn & 1)
        # [BM, BD]
        b_q = s_q.index(PART).reshape([BM, BD]).load(operand)
        b_do = s_do.index(PART).reshape([BM, BD]).load(operand)
        pass_over(ring, before, before + begin, STAGES)
        b_s, b_dp = _products(b_q, b_do, b_zero, ring, before + begin, STAGES)
        b_out = s_out.index(PART).reshape([BM, BD]).load(output).to(gl.float32)
        b_delta = gl.sum(b_out * s_do.index(PART).reshape([BM, BD]).load(output).to(gl.float32), axis=1)
        b_delta = gl.convert_layout(b_delta, rows)
        if HAS_DLSE:
            b_delta -= gl.load(p_dlse + i_row + o_m, mask=m_m, other=0.0)
        gl.store(p_delta + i_statistics + o_m, b_delta, mask=m_m)
        b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
        # The last tile stays for the summaries.
        mbarrier.arrive(v_empty.index((before + begin) % STAGES), count=1, pred=begin + 1 < end)
        # Not before products have used them: a barrier waits for no load, and the copy engine for no warp.
        mbarrier.arrive(rows_empty.index(PART), count=1)
        b_ds = _ds(b_s, b_dp, b_lse2, b_delta, scale_log2, begin, order, seen, BN)
        b_dq = gl.zeros([BM, BD], gl.float32, layout=output)
        b_left = gl.convert_layout(b_ds.to(dtype), left)
        for tile in range(begin + 1, end):
            last = (before + tile - 1) % STAGES
            # [BM, BN]
            b_s, b_dp = _products(b_q, b_do, b_zero, ring, before + tile, STAGES)
            b_dq = warpgroup_mma(b_left, s_k.index(last).reshape([BN, BD]), b_dq, is_async=True)
            b_s, b_dp = warpgroup_mma_wait(1, deps=(b_s, b_dp))
            mbarrier.arrive(v_empty.index((before + tile) % STAGES), count=1, pred=tile + 1 < end)
            b_ds = _ds(b_s, b_dp, b_lse2, b_delta, scale_log2, tile, order, seen, BN)
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            mbarrier.arrive(k_empty.index(last), count=1)
            b_left = gl.convert_layout(b_ds.to(dtype), left)
        last = (before + end - 1) % STAGES
        if OWN:
            loaded = load_own(own, own_queries, first, i_b, i_h, i_h // GROUP, C, S, BM, D, BD)
        b_dq = warpgroup_mma(b_left, s_k.index(last).reshape([BN, BD]), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        b_written = (b_dq * scale).to(dtype)
        o_head = i_b.to(gl.int64) * dq_strides[0] + i_h.to(gl.int64) * dq_strides[2]
        if OWN:
            b_k = chunk_keys(s_k.index(last), PART, C, BM)
            b_v = chunk_keys(s_v.index(last), PART, C, BM)
            p_own_dq, p_own_lse2, p_own_delta, stride_own = own_results
            i_own = i_bh.to(gl.int64) * stride_own
            p_document = p_start + i_b.to(gl.int64) * stride_start if HAS_DOCUMENTS else p_start
            own_dq(
                b_k, b_v, loaded, p_document, p_own_dq + o_head, p_own_lse2 + i_own, p_own_delta + i_own,
                dq_strides[1], scale, scale_log2, C, S, D, HAS_DOCUMENTS,
            )  # fmt: skip
        mbarrier.arrive(k_empty.index(last), count=1)
        mbarrier.arrive(v_empty.index(last), count=1)
        pass_over(ring, before + end, before + total, STAGES)
        before += total
        store_rows(p_dq + o_head, b_written, s_dq.index(PART), first, nq, dq_strides[1], D)
        turn += 1
        item = take(turn, items)


@gluon.jit
def _dq_kernel(
    d_q, d_out, d_do, d_k, d_v, d_ks, d_vs, p_dealt, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    p_ks, p_vs, p_own_q, p_own_do, p_own_dq, p_own_lse2, p_own_delta,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, heads, tiles, all_heads, together,
    stride_start, stride_statistics, stride_own, stride_b, stride_n, stride_h, stride_qb, stride_qn, stride_qh,
    stride_dob, stride_don, stride_doh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, delta and lse to base 2 (for the dK/dV kernel); a work item is two tiles of BM queries of one head.

    OWN: and those of the summaries' queries p_own_q, of the strides of those of the text.
    """
    s_q = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_out = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_do = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_dq = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
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
    k_strides, v_strides = (stride_kb, stride_kn, stride_kh), (stride_vb, stride_vn, stride_vh)
    own = (p_ks, p_vs, k_strides, v_strides, ns // S)
    own_queries = (p_own_q, p_own_do, (stride_qb, stride_qn, stride_qh), (stride_dob, stride_don, stride_doh))
    own_results = (p_own_dq, p_own_lse2, p_own_delta, stride_own)
    dq_strides = (stride_b, stride_n, stride_h)
    gl.warp_specialize(
        [
            (_consume, (
                s_dq, s_rows, rows_full, rows_empty, ring, items, own, own_queries, own_results, p_start, p_lse, p_dlse,
                p_lse2, p_delta, p_dq, stride_start, stride_statistics, dq_strides, sizes, schedule, heads, scale,
                scale_log2, 0, C, S, GROUP, D, BD, BM, BN, STAGES, OWN, HAS_DOCUMENTS, HAS_DLSE,
            )),
            (_consume, (
                s_dq, s_rows, rows_full, rows_empty, ring, items, own, own_queries, own_results, p_start, p_lse, p_dlse,
                p_lse2, p_delta, p_dq, stride_start, stride_statistics, dq_strides, sizes, schedule, heads, scale,
                scale_log2, 1, C, S, GROUP, D, BD, BM, BN, STAGES, OWN, HAS_DOCUMENTS, HAS_DLSE,
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
    dq: Tensor, workspace: Workspace, own: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """As `triton_backward.launch_dq`, for bfloat16 and float16."""
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    nk, ns = k.shape[1], k_summary.shape[1]
    lse2, delta = workspace.lse2, workspace.delta
    block_dim = padded_head_dim(dim)
    tiles = triton.cdiv(nq, 2 * tile.queries)
    launch(
        _dq_kernel, (programs(tiles * batch * heads, q.device),),
        *(descriptor(rows, tile.queries, block_dim) for rows in (q, out, d_out)),
        *(descriptor(rows if rows.shape[1] else q, tile.keys, block_dim) for rows in (k, v, k_summary, v_summary)),
        workspace.dealt_dq, document_start, lse, d_lse, lse2, delta, dq,
        *((k_summary, v_summary, *own, *workspace.own_statistics) if own else [None] * 7),
        nq, nk, ns, query_start, key_start, chunk_start, window, softmax_scale, softmax_scale * LOG2E, heads,
        tiles, batch * heads, TOGETHER,
        document_start.stride(0) if document_start is not None else 0, delta.stride(1),
        workspace.own_statistics[0].stride(1) if own else 0,
        *(stride for rows in (dq, q, d_out, k_summary, v_summary) for stride in rows.stride()[:3]),
        C=chunk_size, S=summary_tokens, GROUP=heads // k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, OWN=own is not None,
        HAS_DOCUMENTS=document_start is not None, HAS_DLSE=d_lse is not None, num_warps=WARPS.value,
    )  # fmt: skip
