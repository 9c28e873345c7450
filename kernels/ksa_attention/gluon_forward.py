"""Forward pass of `triton_forward` in Gluon for Hopper: matrix products run while the softmax of the next tile does.

One step of the loop issues the scores of the next key tile and the product of the current probabilities with their
values; the softmax of the new scores then overlaps the second product (FlashAttention-3, arXiv:2407.08608, section
3.2) and the other consumer's products. Text and summary tiles form one sequence, so that the pipeline is filled once.
The summaries' own queries come last (`gluon_own`).
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
from megatron_ksa.kernels.ksa_attention.gluon_own import attend_own, chunk_keys, load_own
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.launch import launch

# Heads whose tiles are dealt together: their keys share the L2 cache.
TOGETHER = 2


@gluon.jit
def _load(
    d_q, d_keys, s_q, q_full, q_empty, ring, items, p_dealt, p_start, stride_start, sizes, schedule, heads,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The producer: queries of a work item, then the key tiles that they see."""
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < schedule[0] * schedule[1]:
        deal(item, turn, items)
        i_m, i_bh = query_item(item, schedule, BM)
        i_b, i_h = i_bh // heads, i_bh % heads
        total, _, _, order = key_tiles(i_m, i_b, p_start, stride_start, sizes, C, S, BM, BN, HAS_DOCUMENTS)
        for part in gl.static_range(2):
            bar = q_full.index(part)
            mbarrier.wait(q_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, d_q.block_type.nbytes)
            tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_m + part * BM, 0], bar, s_q.index(part))
        after = following(p_dealt)
        step = load_keys(d_keys, i_b, i_h // GROUP, total, order, ring, step, BN, STAGES)
        turn += 1
        item = after
    deal(item, turn, items)


@gluon.jit
def _attend(
    s_q, s_out, q_full, q_empty, ring, items, own, own_queries, p_start, p_out, p_own_out, p_lse, stride_start,
    out_strides, sizes, schedule, heads, scale_log2,
    PART: gl.constexpr, C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: BM queries of every work item against the key tiles that they see."""
    k_full, v_full, k_empty, v_empty, s_k, s_v = ring
    nq = sizes[0]
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
    while item < schedule[0] * schedule[1]:
        i_bh, first, total, begin, end, order = consumer_item(
            item, schedule, heads, p_start, stride_start, sizes, PART, C, S, BM, BN, HAS_DOCUMENTS
        )
        i_b, i_h = i_bh // heads, i_bh % heads
        # [BM]
        o_m = first + gl.arange(0, BM, layout=rows)
        seen = keys_seen(o_m, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
        mbarrier.wait(q_full.index(PART), turn & 1)
        # [BM, BD]
        b_q = s_q.index(PART).reshape([BM, BD]).load(gl.DotOperandLayout(0, scores, 2))
        pass_over(ring, before, before + begin, STAGES)
        slot = (before + begin) % STAGES
        mbarrier.wait(k_full.index(slot), ((before + begin) // STAGES) & 1)
        b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
        b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        # The last tile stays for the summaries.
        mbarrier.arrive(k_empty.index(slot), count=1, pred=begin + 1 < end)
        # Not before a product has used them: a barrier waits for no load, and the copy engine for no warp.
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
            mbarrier.wait(k_full.index(slot), ((before + tile) // STAGES) & 1)
            # [BM, BN]
            b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), v_phase)
            b_acc = warpgroup_mma(b_left, s_v.index(last).reshape([BN, BD]), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(k_empty.index(slot), count=1, pred=tile + 1 < end)
            b_s = masked_scores(b_s, tile, order, seen, BN)
            b_next = gl.maximum(b_max, gl.max(b_s, axis=1) * scale_log2)
            b_p = gl.exp2(b_s * scale_log2 - b_next[:, None])
            b_decay = gl.exp2(b_max - b_next)
            b_sum = b_sum * b_decay + gl.sum(b_p, axis=1)
            b_max = b_next
            b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
            mbarrier.arrive(v_empty.index(last), count=1)
            b_left = gl.convert_layout(b_p.to(dtype), left)
            b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, output))[:, None]
        if OWN:
            loaded = load_own(own, own_queries, first, i_b, i_h, i_h // GROUP, C, S, BM, D, BD)
        mbarrier.wait(v_full.index(slot), ((before + end - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_left, s_v.index(slot).reshape([BN, BD]), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
        m_seen = b_sum > 0
        b_safe = gl.where(m_seen, b_sum, 1.0)
        b_lse = gl.where(m_seen, (b_max + gl.log2(b_safe)) * 0.6931471805599453, float("-inf"))
        b_out = (b_acc * gl.convert_layout(1.0 / b_safe, gl.SliceLayout(1, output))[:, None]).to(dtype)
        o_head = i_b.to(gl.int64) * out_strides[0] + i_h.to(gl.int64) * out_strides[2]
        if OWN:
            b_k = chunk_keys(s_k.index(slot), PART, C, BM)
            b_v = chunk_keys(s_v.index(slot), PART, C, BM)
            p_document = p_start + i_b.to(gl.int64) * stride_start if HAS_DOCUMENTS else p_start
            attend_own(
                b_k, b_v, loaded, p_document, p_own_out + o_head, out_strides[1], scale_log2, C, S, D, HAS_DOCUMENTS
            )  # fmt: skip
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.arrive(v_empty.index(slot), count=1)
        pass_over(ring, before + end, before + total, STAGES)
        before += total
        gl.store(p_lse + i_bh.to(gl.int64) * nq + o_m, b_lse, mask=o_m < nq)
        store_rows(p_out + o_head, b_out, s_out.index(PART), first, nq, out_strides[1], D)
        turn += 1
        item = take(turn, items)


@gluon.jit
def _forward_kernel(
    d_q, d_k, d_v, d_ks, d_vs, p_dealt, p_start, p_out, p_lse, p_ks, p_vs, p_own_q, p_own_out,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2, heads, tiles, all_heads, together,
    stride_start, stride_ob, stride_on, stride_oh, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """out = softmax(scale * Q K^T) V and lse; a work item is two tiles of BM queries of one head.

    OWN: and the outputs of the summaries' queries p_own_q, of the strides of those of the text.
    """
    s_q = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_out = gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    q_full, q_empty = barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    items = queue(2)
    ring = (k_full, v_full, k_empty, v_empty, s_k, s_v)
    sizes = (nq, nk, ns, query_start, key_start, chunk_start, window)
    schedule = (tiles, all_heads, together)
    k_strides, v_strides = (stride_kb, stride_kn, stride_kh), (stride_vb, stride_vn, stride_vh)
    own = (p_ks, p_vs, k_strides, v_strides, ns // S)
    own_queries = (p_own_q, None, (stride_qb, stride_qn, stride_qh), None)
    out_strides = (stride_ob, stride_on, stride_oh)
    gl.warp_specialize(
        [
            (_attend, (
                s_q, s_out, q_full, q_empty, ring, items, own, own_queries, p_start, p_out, p_own_out, p_lse,
                stride_start, out_strides, sizes, schedule, heads, scale_log2, 0, C, S, GROUP, D, BD, BM, BN, STAGES,
                OWN, HAS_DOCUMENTS,
            )),
            (_attend, (
                s_q, s_out, q_full, q_empty, ring, items, own, own_queries, p_start, p_out, p_own_out, p_lse,
                stride_start, out_strides, sizes, schedule, heads, scale_log2, 1, C, S, GROUP, D, BD, BM, BN, STAGES,
                OWN, HAS_DOCUMENTS,
            )),
            (_load, (
                d_q, (d_k, d_v, d_ks, d_vs), s_q, q_full, q_empty, ring, items, p_dealt, p_start, stride_start, sizes,
                schedule, heads, C, S, GROUP, BM, BN, STAGES, HAS_DOCUMENTS,
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tile: Tile, out: Tensor, lse: Tensor, dealt: Tensor, own: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """As `triton_forward.launch_forward`, for bfloat16 and float16."""
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    nk, ns = k.shape[1], k_summary.shape[1]
    block_dim = padded_head_dim(dim)
    d_keys = [descriptor(rows if rows.shape[1] else q, tile.keys, block_dim) for rows in (k, v, k_summary, v_summary)]
    tiles = triton.cdiv(nq, 2 * tile.queries)
    launch(
        _forward_kernel, (programs(tiles * batch * heads, q.device),),
        descriptor(q, tile.queries, block_dim), *d_keys, dealt, document_start, out, lse,
        *((k_summary, v_summary, *own) if own else [None] * 4),
        nq, nk, ns, query_start, key_start, chunk_start, window, softmax_scale * LOG2E, heads,
        tiles, batch * heads, TOGETHER,
        document_start.stride(0) if document_start is not None else 0,
        *(stride for rows in (out, q, k_summary, v_summary) for stride in rows.stride()[:3]),
        C=chunk_size, S=summary_tokens, GROUP=heads // k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, OWN=own is not None,
        HAS_DOCUMENTS=document_start is not None, num_warps=WARPS.value,
    )  # fmt: skip
