"""Forward pass of `triton_forward` in Gluon for Hopper: matrix products run while the softmax of the next tile does.

One step of the loop issues the scores of the next key tile and the product of the current probabilities with their
values; the softmax of the new scores then overlaps the second product (FlashAttention-3, arXiv:2407.08608, section
3.2). Text and summary tiles form one sequence, so that the pipeline is filled once. A program is its own producer: it
refills a buffer as soon as its own product has read it.
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
    descriptor,
    key_tiles,
    load_keys,
    masked_scores,
    ring,
)
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, key_interval
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim


@gluon.jit
def _attend(
    s_q, q_full, p_start, p_out, p_lse, o_row, i_b, i_h, k_full, v_full, k_empty, v_empty, s_k, s_v,
    num_text, total, text_tiles, summary_tiles,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2, stride_start, stride_ob, stride_on, stride_oh,
    PART: gl.constexpr, C: gl.constexpr, S: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: rows [o_row, o_row + BM) of the queries against every key tile."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, output)
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

    # A finite start makes rows that see nothing come out as sum 0 without a special case.
    b_max = gl.full([BM], -1.0e30, gl.float32, layout=rows)
    b_sum = gl.zeros([BM], gl.float32, layout=rows)
    b_acc = gl.zeros([BM, BD], gl.float32, layout=output)
    b_zero = gl.zeros([BM, BN], gl.float32, layout=scores)
    mbarrier.wait(q_full.index(PART), 0)
    # [BM, BD]
    b_q = s_q.index(PART).reshape([BM, BD]).load(gl.DotOperandLayout(0, scores, 2))
    if total > 0:
        mbarrier.wait(k_full.index(0), 0)
        b_s = warpgroup_mma(b_q, s_k.index(0).reshape([BN, BD]).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        b_s = masked_scores(
            b_s, 0, num_text, text_tiles, summary_tiles, b_text_lower, b_text_upper, b_summary_lower, b_summary_upper,
            BN,
        )  # fmt: skip
        b_max = gl.maximum(b_max, gl.max(b_s, axis=1) * scale_log2)
        b_p = gl.exp2(b_s * scale_log2 - b_max[:, None])
        b_sum = gl.sum(b_p, axis=1)
        b_left = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, output, 2))
        for tile in range(1, total):
            slot = tile % STAGES
            mbarrier.wait(k_full.index(slot), (tile // STAGES) & 1)
            # [BM, BN]
            b_keys = s_k.index(slot).reshape([BN, BD]).permute((1, 0))
            b_s = warpgroup_mma(b_q, b_keys, b_zero, use_acc=False, is_async=True)
            before = (tile - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
            b_acc = warpgroup_mma(b_left, s_v.index(before).reshape([BN, BD]), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(k_empty.index(slot), count=1)
            b_s = masked_scores(
                b_s, tile, num_text, text_tiles, summary_tiles, b_text_lower, b_text_upper, b_summary_lower,
                b_summary_upper, BN,
            )  # fmt: skip
            b_next = gl.maximum(b_max, gl.max(b_s, axis=1) * scale_log2)
            b_p = gl.exp2(b_s * scale_log2 - b_next[:, None])
            b_decay = gl.exp2(b_max - b_next)
            b_sum = b_sum * b_decay + gl.sum(b_p, axis=1)
            b_max = b_next
            b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
            mbarrier.arrive(v_empty.index(before), count=1)
            b_left = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, output, 2))
            b_acc = b_acc * gl.convert_layout(b_decay, out_rows)[:, None]
        last = total - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        b_acc = warpgroup_mma(b_left, s_v.index(last % STAGES).reshape([BN, BD]), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,))

    m_seen = b_sum > 0
    b_safe = gl.where(m_seen, b_sum, 1.0)
    b_lse = gl.where(m_seen, (b_max + gl.log2(b_safe)) * 0.6931471805599453, float("-inf"))
    gl.store(p_lse + o_m, b_lse, mask=m_m)
    b_out = (b_acc / gl.convert_layout(b_safe, out_rows)[:, None]).to(dtype)
    o_out = o_row + gl.arange(0, BM, layout=out_rows)
    o_d = gl.arange(0, BD, layout=gl.SliceLayout(0, output))
    # [BM, BD]
    p_rows = p_out + o_out[:, None].to(gl.int64) * stride_on + o_d[None, :]
    gl.store(p_rows, b_out, mask=(o_out < nq)[:, None] & (o_d < D)[None, :])


@gluon.jit
def _forward_kernel(
    d_q, d_k, d_v, d_ks, d_vs, p_start, p_out, p_lse,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2, heads,
    stride_start, stride_ob, stride_on, stride_oh,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """out = softmax(scale * Q K^T) V and lse for two tiles of BM queries of one head; the longest go first."""
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
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full, k_empty = ring(STAGES, 2)
    v_full, v_empty = ring(STAGES, 2)
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), count=1)
    for part in gl.static_range(2):
        mbarrier.expect(q_full.index(part), d_q.block_type.nbytes)
        tma.async_copy_global_to_shared(
            d_q, [i_b, i_h, i_m + part * BM, 0], q_full.index(part), s_q.index(part)
        )
    p_out += i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_lse += gl.program_id(1).to(gl.int64) * nq
    gl.warp_specialize(
        [
            (_attend, (
                s_q, q_full, p_start, p_out, p_lse, i_m, i_b, i_h, k_full, v_full, k_empty, v_empty, s_k, s_v,
                num_text, total, text_tiles, summary_tiles,
                nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2,
                stride_start, stride_ob, stride_on, stride_oh, 0, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS,
            )),
            (_attend, (
                s_q, q_full, p_start, p_out, p_lse, i_m + BM, i_b, i_h, k_full, v_full, k_empty, v_empty, s_k, s_v,
                num_text, total, text_tiles, summary_tiles,
                nq, nk, ns, query_start, key_start, chunk_start, window, scale_log2,
                stride_start, stride_ob, stride_on, stride_oh, 1, C, S, D, BD, BM, BN, STAGES, HAS_DOCUMENTS,
            )),
            (load_keys, (
                d_k, d_v, d_ks, d_vs, i_b, i_g, num_text, text_tiles[0], summary_tiles[0], total, k_full, v_full,
                k_empty, v_empty, s_k, s_v, BN, STAGES,
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tile: Tile, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """As `triton_forward.launch_forward`, for bfloat16 and float16."""
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    nk, ns = k.shape[1], k_summary.shape[1]
    block_dim = padded_head_dim(dim)
    d_keys = [descriptor(rows if rows.shape[1] else q, tile.keys, block_dim) for rows in (k, v, k_summary, v_summary)]
    _forward_kernel[(triton.cdiv(nq, 2 * tile.queries), batch * heads)](
        descriptor(q, tile.queries, block_dim), *d_keys, document_start, out, lse,
        nq, nk, ns, query_start, key_start, chunk_start, window, softmax_scale * LOG2E, heads,
        document_start.stride(0) if document_start is not None else 0, *out.stride()[:3],
        C=chunk_size, S=summary_tokens, GROUP=heads // k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, HAS_DOCUMENTS=document_start is not None,
        num_warps=WARPS.value,
    )  # fmt: skip
