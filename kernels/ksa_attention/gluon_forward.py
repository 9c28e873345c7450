"""Forward pass of `triton_text_forward` in Gluon for Hopper: products of matrices run while the next softmax does.

One step of the loop issues the scores of the next key tile and the product of the current probabilities with their
values; the softmax of the new scores then overlaps the second product (FlashAttention-3, arXiv:2407.08608, section
3.2) and the other consumer's products. Text and summary tiles form one sequence, so that the pipeline is filled once.
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
from megatron_ksa.kernels.ksa_attention.gluon_summary import attend_summaries, chunk_keys, load_summaries
from megatron_ksa.kernels.ksa_attention.operands import Rows, Sizes, SummaryForward, TextOutputs
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.launch import launch

# Work items of two heads take turns: the heads' keys share the L2 cache.
HEADS_IN_TURN = 2


@gluon.jit
def _load(d_q, d_keys, s_q, q_full, q_empty, ring, items, p_dealt, starts, sizes, schedule, heads, constants):
    """The producer: queries of a work item, then the key tiles that they see."""
    BM: gl.constexpr = constants.BM
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < schedule.tiles * schedule.all_heads:
        deal(item, turn, items)
        i_m, i_bh = query_item(item, schedule, BM)
        i_b, i_h = i_bh // heads, i_bh % heads
        total, _, _, order = key_tiles(i_m, i_b, starts, sizes, constants)
        for part in gl.static_range(2):
            bar = q_full.index(part)
            mbarrier.wait(q_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, d_q.block_type.nbytes)
            tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
        after = following(p_dealt)
        step = load_keys(d_keys, i_b, i_h // constants.GROUP, total, order, ring, step, constants)
        turn += 1
        item = after
    deal(item, turn, items)


@gluon.jit
def _attend(
    s_q, s_out, q_full, q_empty, ring, items, summary_keys, summary_queries, starts, p_out, p_summary_out, p_lse,
    out_strides, sizes, schedule, heads, scale_log2, constants, PART: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: BM queries of every work item against the key tiles that they see.

    out_strides: of p_out and p_summary_out.
    """
    C: gl.constexpr = constants.C
    BD: gl.constexpr = constants.BD
    BM: gl.constexpr = constants.BM
    BN: gl.constexpr = constants.BN
    STAGES: gl.constexpr = constants.STAGES
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
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
        seen = keys_seen(o_m, i_b, starts, sizes, constants)
        mbarrier.wait(q_full.index(PART), turn & 1)
        # [BM, BD]
        b_q = s_q.index(PART).reshape([BM, BD]).load(gl.DotOperandLayout(0, scores, 2))
        pass_over(ring, before, before + begin, STAGES)
        slot = (before + begin) % STAGES
        mbarrier.wait(ring.k_full.index(slot), ((before + begin) // STAGES) & 1)
        b_keys = ring.k.index(slot).reshape([BN, BD]).permute((1, 0))
        b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        # The last tile stays for the summary queries.
        mbarrier.arrive(ring.k_empty.index(slot), count=1, pred=begin + 1 < end)
        # Release s_q only after a product has read it: an mbarrier's arrive does not wait for this warp's pending
        # loads, and the copy engine does not wait for warps.
        mbarrier.arrive(q_empty.index(PART), count=1)
        b_s = masked_scores(b_s, begin, order, seen, BN)
        # A finite start makes rows that see nothing come out as sum 0 without a special case.
        b_max = gl.maximum(gl.max(b_s, axis=1) * scale_log2, -1.0e30)
        b_p = gl.exp2(b_s * scale_log2 - b_max[:, None])
        b_sum = gl.sum(b_p, axis=1)
        b_acc = gl.zeros([BM, BD], gl.float32, layout=output)
        b_left = gl.convert_layout(b_p.to(dtype), left)
        for tile in range(begin + 1, end):
            last = slot
            v_phase = ((before + tile - 1) // STAGES) & 1
            slot = (before + tile) % STAGES
            mbarrier.wait(ring.k_full.index(slot), ((before + tile) // STAGES) & 1)
            # [BM, BN]
            b_keys = ring.k.index(slot).reshape([BN, BD]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(ring.v_full.index(last), v_phase)
            b_acc = warpgroup_mma(b_left, ring.v.index(last).reshape([BN, BD]), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(ring.k_empty.index(slot), count=1, pred=tile + 1 < end)
            b_s = masked_scores(b_s, tile, order, seen, BN)
            b_next = gl.maximum(b_max, gl.max(b_s, axis=1) * scale_log2)
            b_p = gl.exp2(b_s * scale_log2 - b_next[:, None])
            b_decay = gl.exp2(b_max - b_next)
            b_sum = b_sum * b_decay + gl.sum(b_p, axis=1)
            b_max = b_next
            b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
            mbarrier.arrive(ring.v_empty.index(last), count=1)
            b_left = gl.convert_layout(b_p.to(dtype), left)
            b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, output))[:, None]
        if constants.HAS_SUMMARIES:
            loaded = load_summaries(summary_keys, summary_queries, first, i_b, i_h, i_h // constants.GROUP, constants)
        mbarrier.wait(ring.v_full.index(slot), ((before + end - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_left, ring.v.index(slot).reshape([BN, BD]), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
        m_seen = b_sum > 0
        b_safe = gl.where(m_seen, b_sum, 1.0)
        b_lse = gl.where(m_seen, (b_max + gl.log2(b_safe)) * 0.6931471805599453, float("-inf"))
        b_out = (b_acc * gl.convert_layout(1.0 / b_safe, gl.SliceLayout(1, output))[:, None]).to(dtype)
        o_head = i_b.to(gl.int64) * out_strides.batch + i_h.to(gl.int64) * out_strides.head
        if constants.HAS_SUMMARIES:
            b_k = chunk_keys(ring.k.index(slot), PART, C, BM)
            b_v = chunk_keys(ring.v.index(slot), PART, C, BM)
            p_start = starts.p + i_b.to(gl.int64) * starts.stride if constants.HAS_DOCUMENTS else starts.p
            attend_summaries(
                b_k, b_v, loaded, p_start, p_summary_out + o_head, out_strides.row, scale_log2, constants
            )  # fmt: skip
        mbarrier.arrive(ring.k_empty.index(slot), count=1)
        mbarrier.arrive(ring.v_empty.index(slot), count=1)
        pass_over(ring, before + end, before + total, STAGES)
        before += total
        gl.store(p_lse + i_bh.to(gl.int64) * sizes.nq + o_m, b_lse, mask=o_m < sizes.nq)
        store_rows(p_out + o_head, b_out, s_out.index(PART), first, sizes.nq, out_strides.row, constants.D)
        turn += 1
        item = take(turn, items)


@gluon.jit
def _forward_kernel(
    d_q, d_k, d_v, d_ks, d_vs, p_dealt, p_start, p_out, p_lse, p_ks, p_vs, p_summary_q, p_summary_out,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2, heads, tiles, all_heads, together,
    stride_start, stride_ob, stride_on, stride_oh, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_SUMMARIES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """out = softmax(scale * Q K^T) V and lse; a work item is two tiles of BM queries of one head.

    HAS_SUMMARIES: also the outputs of the summary queries p_summary_q; strides of q and out are those of the text's.
    """
    s_q = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_out = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    q_full, q_empty = barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    items = queue(2)
    ring = KeyRing(k_full, v_full, k_empty, v_empty, s_k, s_v)
    sizes = QuerySizes(nq, nk, ns, query_start, key_start, chunk_start, window)
    schedule = Schedule(tiles, all_heads, together, 1)
    starts = Documents(p_start, stride_start)
    k_strides, v_strides = Strides(stride_kb, stride_kn, stride_kh), Strides(stride_vb, stride_vn, stride_vh)
    summary_keys = SummaryKeys(p_ks, p_vs, k_strides, v_strides, ns // S)
    summary_queries = SummaryQueries(p_summary_q, None, Strides(stride_qb, stride_qn, stride_qh), None)
    out_strides = Strides(stride_ob, stride_on, stride_oh)
    gl.warp_specialize(
        [
            (_attend, (
                s_q, s_out, q_full, q_empty, ring, items, summary_keys, summary_queries, starts, p_out, p_summary_out,
                p_lse, out_strides, sizes, schedule, heads, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 0,
            )),
            (_attend, (
                s_q, s_out, q_full, q_empty, ring, items, summary_keys, summary_queries, starts, p_out, p_summary_out,
                p_lse, out_strides, sizes, schedule, heads, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 1,
            )),
            (_load, (
                d_q, KeyDescriptors(d_k, d_v, d_ks, d_vs), s_q, q_full, q_empty, ring, items, p_dealt, starts, sizes,
                schedule, heads,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS),
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_forward(
    rows: Rows, sizes: Sizes, tile: Tile, outputs: TextOutputs, dealt: Tensor, summary: SummaryForward | None
) -> None:
    """As `triton_text_forward.launch_forward`, for bfloat16 and float16."""
    q, *keys, document_start = rows
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    block_dim = padded_head_dim(dim)
    tiles = triton.cdiv(nq, 2 * tile.queries)
    launch(
        _forward_kernel, (programs(tiles * batch * heads, q.device),),
        descriptor(q, tile.queries, block_dim),
        *(descriptor(kind if kind.shape[1] else q, tile.keys, block_dim) for kind in keys),
        dealt, document_start, *outputs,
        *((rows.k_summary, rows.v_summary, *summary) if summary else [None] * 4),
        nq, rows.k.shape[1], rows.k_summary.shape[1], sizes.query_start, sizes.key_start, sizes.chunk_start,
        sizes.window, sizes.softmax_scale * LOG2E, heads, tiles, batch * heads, HEADS_IN_TURN,
        document_start.stride(0) if document_start is not None else 0,
        *(stride for t in (outputs.out, q, rows.k_summary, rows.v_summary) for stride in t.stride()[:3]),
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=heads // rows.k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, HAS_SUMMARIES=summary is not None,
        HAS_DOCUMENTS=document_start is not None, num_warps=WARPS.value,
    )  # fmt: skip
