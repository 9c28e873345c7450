"""dQ of `triton_text_backward` in Gluon for Hopper: the product dS K of a key tile runs while the next dS is computed.

The summary queries beside a consumer's text queries come last in a work item (`gluon_summary`).
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from megatron_ksa.kernels.ksa_attention.gluon_arguments import (
    Constants,
    Documents,
    KeyDescriptors,
    KeyRing,
    QuerySizes,
    Schedule,
    Strides,
    SummaryKeys,
    SummaryQueries,
    SummaryResults,
)
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
from megatron_ksa.kernels.ksa_attention.gluon_summary import chunk_keys, load_summaries, summary_dq
from megatron_ksa.kernels.ksa_attention.operands import OutputGradients, Rows, Sizes, SummaryBackward, TextOutputs
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.ksa_attention.workspace import Workspace
from megatron_ksa.kernels.launch import launch

# Work items of two heads take turns: the heads' keys share the L2 cache.
HEADS_IN_TURN = 2


@gluon.jit
def _load(
    d_rows, d_keys, s_rows, rows_full, rows_empty, ring, items, p_dealt, starts, sizes, schedule, heads, constants
):
    """The producer: queries, outputs and dO of a work item, then the key tiles that the queries see."""
    BM: gl.constexpr = constants.BM
    d_q, d_out, d_do = d_rows
    s_q, s_out, s_do = s_rows
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < schedule.tiles * schedule.all_heads:
        deal(item, turn, items)
        i_m, i_bh = query_item(item, schedule, BM)
        i_b, i_h = i_bh // heads, i_bh % heads
        total, _, _, order = key_tiles(i_m, i_b, starts, sizes, constants)
        for part in gl.static_range(2):
            bar = rows_full.index(part)
            mbarrier.wait(rows_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, 3 * d_q.block_type.nbytes)
            tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
            tma.async_copy_global_to_shared(d_out, [i_b, i_h, i_m + part * BM, 0], bar, s_out.index(part))
            tma.async_copy_global_to_shared(d_do, [i_b, i_h, i_m + part * BM, 0], bar, s_do.index(part))
        after = following(p_dealt)
        step = load_keys(d_keys, i_b, i_h // constants.GROUP, total, order, ring, step, constants)
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
    BN: gl.constexpr = b_zero.shape[1]
    BD: gl.constexpr = b_q.shape[1]
    slot = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(ring.k_full.index(slot), phase)
    b_keys = ring.k.index(slot).reshape([BN, BD]).permute((1, 0))
    b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
    mbarrier.wait(ring.v_full.index(slot), phase)
    b_values = ring.v.index(slot).reshape([BN, BD]).permute((1, 0))
    b_dp = warpgroup_mma(b_do, b_values, b_zero, use_acc=False, is_async=True)
    return b_s, b_dp


@gluon.jit
def _consume(
    s_dq, s_rows, rows_full, rows_empty, ring, items, summary_keys, summary_queries, summary_results, starts, p_lse,
    p_dlse, p_lse2, p_delta, p_dq, stride_statistics, dq_strides, sizes, schedule, heads, scale, scale_log2, constants,
    PART: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: dQ of BM queries of every work item; also delta, and lse to base 2.

    dq_strides: of p_dq and of the summary queries' dQ.
    """
    C: gl.constexpr = constants.C
    BD: gl.constexpr = constants.BD
    BM: gl.constexpr = constants.BM
    BN: gl.constexpr = constants.BN
    STAGES: gl.constexpr = constants.STAGES
    s_q, s_out, s_do = s_rows
    nq = sizes.nq
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
    while item < schedule.tiles * schedule.all_heads:
        i_bh, first, total, begin, end, order = consumer_item(item, schedule, heads, starts, sizes, constants, PART)
        i_b, i_h = i_bh // heads, i_bh % heads
        # [BM]
        o_m = first + gl.arange(0, BM, layout=rows)
        m_m = o_m < nq
        seen = keys_seen(o_m, i_b, starts, sizes, constants)
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
        # The last tile stays for the summary queries.
        mbarrier.arrive(ring.v_empty.index((before + begin) % STAGES), count=1, pred=begin + 1 < end)
        # Release the rows only after products have read them: an mbarrier's arrive does not wait for this warp's
        # pending loads, and the copy engine does not wait for warps.
        mbarrier.arrive(rows_empty.index(PART), count=1)
        b_ds = _ds(b_s, b_dp, b_lse2, b_delta, scale_log2, begin, order, seen, BN)
        b_dq = gl.zeros([BM, BD], gl.float32, layout=output)
        b_left = gl.convert_layout(b_ds.to(dtype), left)
        for tile in range(begin + 1, end):
            last = (before + tile - 1) % STAGES
            # [BM, BN]
            b_s, b_dp = _products(b_q, b_do, b_zero, ring, before + tile, STAGES)
            b_dq = warpgroup_mma(b_left, ring.k.index(last).reshape([BN, BD]), b_dq, is_async=True)
            b_s, b_dp = warpgroup_mma_wait(1, deps=(b_s, b_dp))
            mbarrier.arrive(ring.v_empty.index((before + tile) % STAGES), count=1, pred=tile + 1 < end)
            b_ds = _ds(b_s, b_dp, b_lse2, b_delta, scale_log2, tile, order, seen, BN)
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            mbarrier.arrive(ring.k_empty.index(last), count=1)
            b_left = gl.convert_layout(b_ds.to(dtype), left)
        last = (before + end - 1) % STAGES
        if constants.HAS_SUMMARIES:
            loaded = load_summaries(summary_keys, summary_queries, first, i_b, i_h, i_h // constants.GROUP, constants)
        b_dq = warpgroup_mma(b_left, ring.k.index(last).reshape([BN, BD]), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        b_written = (b_dq * scale).to(dtype)
        o_head = i_b.to(gl.int64) * dq_strides.batch + i_h.to(gl.int64) * dq_strides.head
        if constants.HAS_SUMMARIES:
            b_k = chunk_keys(ring.k.index(last), PART, C, BM)
            b_v = chunk_keys(ring.v.index(last), PART, C, BM)
            i_summary = i_bh.to(gl.int64) * summary_results.stride
            p_start = starts.p + i_b.to(gl.int64) * starts.stride if constants.HAS_DOCUMENTS else starts.p
            summary_dq(
                b_k, b_v, loaded, p_start, summary_results.dq + o_head, summary_results.lse2 + i_summary,
                summary_results.delta + i_summary, dq_strides.row, scale, scale_log2, constants,
            )  # fmt: skip
        mbarrier.arrive(ring.k_empty.index(last), count=1)
        mbarrier.arrive(ring.v_empty.index(last), count=1)
        pass_over(ring, before + end, before + total, STAGES)
        before += total
        store_rows(p_dq + o_head, b_written, s_dq.index(PART), first, nq, dq_strides.row, constants.D)
        turn += 1
        item = take(turn, items)


@gluon.jit
def _dq_kernel(
    d_q, d_out, d_do, d_k, d_v, d_ks, d_vs, p_dealt, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    p_ks, p_vs, p_summary_q, p_summary_do, p_summary_dq, p_summary_lse2, p_summary_delta,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, heads, tiles, all_heads, together,
    stride_start, stride_statistics, stride_summary, stride_b, stride_n, stride_h, stride_qb, stride_qn, stride_qh,
    stride_dob, stride_don, stride_doh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_SUMMARIES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, delta and lse to base 2 (for the dK/dV kernel); a work item is two tiles of BM queries of one head.

    HAS_SUMMARIES: also those of the summary queries p_summary_q; strides of q, dO and dQ are those of the text's.
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
    ring = KeyRing(k_full, v_full, k_empty, v_empty, s_k, s_v)
    sizes = QuerySizes(nq, nk, ns, query_start, key_start, chunk_start, window)
    schedule = Schedule(tiles, all_heads, together, 1)
    starts = Documents(p_start, stride_start)
    k_strides, v_strides = Strides(stride_kb, stride_kn, stride_kh), Strides(stride_vb, stride_vn, stride_vh)
    summary_keys = SummaryKeys(p_ks, p_vs, k_strides, v_strides, ns // S)
    q_strides, do_strides = Strides(stride_qb, stride_qn, stride_qh), Strides(stride_dob, stride_don, stride_doh)
    summary_queries = SummaryQueries(p_summary_q, p_summary_do, q_strides, do_strides)
    summary_results = SummaryResults(p_summary_dq, p_summary_lse2, p_summary_delta, stride_summary)
    dq_strides = Strides(stride_b, stride_n, stride_h)
    gl.warp_specialize(
        [
            (_consume, (
                s_dq, s_rows, rows_full, rows_empty, ring, items, summary_keys, summary_queries, summary_results,
                starts, p_lse, p_dlse, p_lse2, p_delta, p_dq, stride_statistics, dq_strides, sizes, schedule, heads,
                scale, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 0, HAS_DLSE,
            )),
            (_consume, (
                s_dq, s_rows, rows_full, rows_empty, ring, items, summary_keys, summary_queries, summary_results,
                starts, p_lse, p_dlse, p_lse2, p_delta, p_dq, stride_statistics, dq_strides, sizes, schedule, heads,
                scale, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 1, HAS_DLSE,
            )),
            (_load, (
                (d_q, d_out, d_do), KeyDescriptors(d_k, d_v, d_ks, d_vs), s_rows, rows_full, rows_empty, ring, items,
                p_dealt, starts, sizes, schedule, heads,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS),
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_dq(
    rows: Rows, sizes: Sizes, tile: Tile, outputs: TextOutputs, d_outputs: OutputGradients, dq: Tensor,
    workspace: Workspace, summary: SummaryBackward | None,
) -> None:  # fmt: skip
    """As `triton_text_backward.launch_dq`, for bfloat16 and float16."""
    q, *keys, document_start = rows
    out, d_out = outputs.out, d_outputs.d_out
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    block_dim = padded_head_dim(dim)
    tiles = triton.cdiv(nq, 2 * tile.queries)
    pointers, stride_summary = [None] * 7, 0
    if summary is not None:
        statistics = (workspace.summary_lse2, workspace.summary_delta)
        pointers = [rows.k_summary, rows.v_summary, *summary, *statistics]
        stride_summary = workspace.summary_lse2.stride(1)
    launch(
        _dq_kernel, (programs(tiles * batch * heads, q.device),),
        *(descriptor(kind, tile.queries, block_dim) for kind in (q, out, d_out)),
        *(descriptor(kind if kind.shape[1] else q, tile.keys, block_dim) for kind in keys),
        workspace.dealt_dq, document_start, outputs.lse, d_outputs.d_lse, workspace.lse2, workspace.delta, dq,
        *pointers,
        nq, rows.k.shape[1], rows.k_summary.shape[1], sizes.query_start, sizes.key_start, sizes.chunk_start,
        sizes.window, sizes.softmax_scale, sizes.softmax_scale * LOG2E, heads, tiles, batch * heads, HEADS_IN_TURN,
        document_start.stride(0) if document_start is not None else 0, workspace.delta.stride(1), stride_summary,
        *(stride for t in (dq, q, d_out, rows.k_summary, rows.v_summary) for stride in t.stride()[:3]),
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=heads // rows.k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, HAS_SUMMARIES=summary is not None,
        HAS_DOCUMENTS=document_start is not None, HAS_DLSE=d_outputs.d_lse is not None, num_warps=WARPS.value,
    )  # fmt: skip
