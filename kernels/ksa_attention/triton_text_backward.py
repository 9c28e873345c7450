"""Backward pass of the text queries of KSA attention, without atomics: dQ, then dK and dV of either kind of keys.

With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(dO * O) - dLSE:

    dS = P * (dP - delta)      dQ = scale * dS K      dK = scale * dS^T Q      dV = P^T dO
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    OutputGradients,
    Rows,
    Sizes,
    SummaryBackward,
    TextOutputs,
)
from megatron_ksa.kernels.ksa_attention.triton_common import (
    LOG2E,
    descriptor,
    key_interval,
    query_interval,
    tile_ranges,
)
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles, padded_head_dim
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, split_strides
from megatron_ksa.kernels.launch import call, launch


@triton.jit
def _dq_tiles(
    b_dq, b_q, b_do, b_lse2, b_delta, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2, begin, end, gap_at, gap,
    BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ from the key tiles [begin, end), where tiles from gap_at on are `gap` tiles further on."""
    for tile in range(begin, end):
        o_n = tile * BN
        if MASKED:
            o_n += tl.where(tile >= gap_at, gap, 0) * BN
        # [BN, BD]
        b_k = d_k.load([i_b, i_g, o_n, 0]).reshape(BN, BD)
        b_v = d_v.load([i_b, i_g, o_n, 0]).reshape(BN, BD)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse2[:, None])
        if MASKED:
            o_key = o_n + tl.arange(0, BN)
            b_p = tl.where((o_key >= b_lower[:, None]) & (o_key < b_upper[:, None]), b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _dq_phase(
    b_dq, b_q, b_do, b_lse2, b_delta, d_k, d_v, i_b, i_g, o_i, b_start, first_query, last_query,
    first_start, last_start, offset, num_keys, window, scale_log2,
    C: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, IS_TEXT: tl.constexpr,
):  # fmt: skip
    """dQ from all keys of one kind, with masks only in the tiles at both ends of the interval."""
    # [BM]
    b_lower, b_upper = key_interval(o_i, b_start, offset, num_keys, window, C, S, IS_TEXT)
    lower, full_upper = key_interval(first_query, first_start, offset, num_keys, window, C, S, IS_TEXT)
    full_lower, upper = key_interval(last_query, last_start, offset, num_keys, window, C, S, IS_TEXT)
    first, full_first, full_stop, stop = tile_ranges(lower, full_lower, full_upper, upper, BN)
    full = full_stop - full_first
    b_dq = _dq_tiles(
        b_dq, b_q, b_do, b_lse2, b_delta, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2,
        full_first, full_stop, 0, 0, BN, BD, False,
    )  # fmt: skip
    return _dq_tiles(
        b_dq, b_q, b_do, b_lse2, b_delta, d_k, d_v, i_b, i_g, b_lower, b_upper, scale_log2,
        first, stop - full, full_first, full, BN, BD, True,
    )  # fmt: skip


@triton.jit
def _dq_kernel(
    d_q, d_out, d_do, d_k, d_v, d_ks, d_vs, p_start, p_lse, p_dlse, p_lse2, p_delta, p_dq,
    nq, nk, ns, query_start, key_start, chunk_start, window, scale, scale_log2, heads,
    stride_start, stride_statistics, stride_b, stride_n, stride_h,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head; also writes what the dK/dV kernel reads: delta, and lse to base 2."""
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

    o_row = tl.program_id(1).to(tl.int64) * nq + o_m
    o_statistics = tl.program_id(1).to(tl.int64) * stride_statistics + o_m
    # [BM, BD]
    b_q = d_q.load([i_b, i_h, i_m * BM, 0]).reshape(BM, BD)
    b_do = d_do.load([i_b, i_h, i_m * BM, 0]).reshape(BM, BD)
    b_out = d_out.load([i_b, i_h, i_m * BM, 0]).reshape(BM, BD)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), axis=1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + o_row, mask=m_m, other=0.0)
    tl.store(p_delta + o_statistics, b_delta, mask=m_m)
    # Rows beyond nq get probability exp(-inf) = 0.
    b_lse2 = tl.load(p_lse + o_row, mask=m_m, other=float("inf")) * 1.4426950408889634
    tl.store(p_lse2 + o_statistics, b_lse2, mask=m_m)
    # [BM, BD]
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    b_dq = _dq_phase(
        b_dq, b_q, b_do, b_lse2, b_delta, d_k, d_v, i_b, i_g, o_i, b_start, first_query, last_query,
        first_start, last_start, key_start, nk, window, scale_log2, C, S, BN, BD, True,
    )  # fmt: skip
    b_dq = _dq_phase(
        b_dq, b_q, b_do, b_lse2, b_delta, d_ks, d_vs, i_b, i_g, o_i, b_start, first_query, last_query,
        first_start, last_start, chunk_start, ns, window, scale_log2, C, S, BN, BD, False,
    )  # fmt: skip
    o_d = tl.arange(0, BD)
    p_dq += i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    p_rows = p_dq + o_m[:, None].to(tl.int64) * stride_n + o_d[None, :]
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def _dkv_tiles(
    b_dk, b_dv, b_k, b_v, d_q, d_do, d_lse2, d_delta, p_start, i_b, i_h, o_n,
    nq, num_keys, query_start, offset, window, scale_log2, begin, end, gap_at, gap,
    C: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    IS_TEXT: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK and dV from the query tiles [begin, end) of one head, where tiles from gap_at on are `gap` further on.

    Rows beyond nq read as 0 throughout and add nothing.
    """
    for step in range(begin, end):
        # From the last tile down: programs of different keys then read the same queries at the same time.
        tile = begin + end - 1 - step
        if MASKED:
            tile += tl.where(tile >= gap_at, gap, 0)
        # [BM]; through the copy engine, since a pointer load would make every thread copy the whole vector.
        b_lse2 = d_lse2.load([i_b, i_h, tile * BM]).reshape(BM)
        b_delta = d_delta.load([i_b, i_h, tile * BM]).reshape(BM)
        # [BM, BD]
        b_q = d_q.load([i_b, i_h, tile * BM, 0]).reshape(BM, BD)
        b_do = d_do.load([i_b, i_h, tile * BM, 0]).reshape(BM, BD)
        # [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse2[None, :])
        if MASKED:
            o_m = tile * BM + tl.arange(0, BM)
            if HAS_DOCUMENTS:
                b_start = tl.load(p_start + query_start + o_m, mask=o_m < nq, other=0)
            else:
                b_start = tl.zeros([BM], dtype=tl.int32)
            b_lower, b_upper = key_interval(query_start + o_m, b_start, offset, num_keys, window, C, S, IS_TEXT)
            m_seen = (o_n[:, None] >= b_lower[None, :]) & (o_n[:, None] < b_upper[None, :])
            b_p = tl.where(m_seen, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        # [BN, BM]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _dkv_kernel(
    d_k, d_v, d_q, d_do, d_lse2, d_delta, p_start, p_dk, p_dv,
    nq, num_keys, query_start, offset, window, scale, scale_log2, groups,
    stride_start, stride_split, stride_b, stride_n, stride_g,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, IS_TEXT: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of text keys (IS_TEXT) or summaries, summed over the query heads that read it.

    Program (i_n, batch and K/V head, i_s): the i_s-th part of the queries, written to its own slice of dk and dv.
    """
    i_n = tl.program_id(0)
    i_b = tl.program_id(1) // groups
    i_g = tl.program_id(1) % groups
    i_s = tl.program_id(2)
    # [BN]
    o_n = i_n * BN + tl.arange(0, BN)
    if HAS_DOCUMENTS:
        p_start += i_b.to(tl.int64) * stride_start
    last_key = tl.minimum(i_n * BN + BN, num_keys) - 1
    lower, full_upper = query_interval(i_n * BN, p_start, offset, query_start, nq, window, C, S, IS_TEXT, HAS_DOCUMENTS)
    full_lower, upper = query_interval(last_key, p_start, offset, query_start, nq, window, C, S, IS_TEXT, HAS_DOCUMENTS)
    first, full_first, full_stop, stop = tile_ranges(lower, full_lower, full_upper, upper, BM)
    part = tl.cdiv(stop - first, tl.num_programs(2))
    first = tl.minimum(first + i_s * part, stop)
    stop = tl.minimum(first + part, stop)
    full_first = tl.minimum(tl.maximum(full_first, first), stop)
    full_stop = tl.minimum(tl.maximum(full_stop, full_first), stop)
    full = full_stop - full_first

    # [BN, BD]
    b_k = d_k.load([i_b, i_g, i_n * BN, 0]).reshape(BN, BD)
    b_v = d_v.load([i_b, i_g, i_n * BN, 0]).reshape(BN, BD)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)
    for i_r in range(0, GROUP):
        i_h = i_g * GROUP + i_r
        b_dk, b_dv = _dkv_tiles(
            b_dk, b_dv, b_k, b_v, d_q, d_do, d_lse2, d_delta, p_start, i_b, i_h, o_n,
            nq, num_keys, query_start, offset, window, scale_log2, full_first, full_stop, 0, 0,
            C, S, BM, BD, IS_TEXT, HAS_DOCUMENTS, False,
        )  # fmt: skip
        b_dk, b_dv = _dkv_tiles(
            b_dk, b_dv, b_k, b_v, d_q, d_do, d_lse2, d_delta, p_start, i_b, i_h, o_n,
            nq, num_keys, query_start, offset, window, scale_log2, first, stop - full, full_first, full,
            C, S, BM, BD, IS_TEXT, HAS_DOCUMENTS, True,
        )  # fmt: skip
    # [BN, BD]
    o_d = tl.arange(0, BD)
    o_out = i_s.to(tl.int64) * stride_split + i_b.to(tl.int64) * stride_b + i_g.to(tl.int64) * stride_g
    o_out += o_n[:, None].to(tl.int64) * stride_n + o_d[None, :]
    m_out = (o_n < num_keys)[:, None] & (o_d < D)[None, :]
    tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


def launch_dq(
    rows: Rows, sizes: Sizes, tile: Tile, outputs: TextOutputs, d_outputs: OutputGradients, dq: Tensor,
    workspace: Workspace, summary: SummaryBackward | None = None,
) -> None:  # fmt: skip
    """Fill dq of the text queries, and lse2 and delta of the workspace.

    summary: the summary queries, whose dQ and statistics are filled too (conditions: `launch_forward`).
    """
    if tile.specialised:
        from megatron_ksa.kernels.ksa_attention import gluon_dq

        gluon_dq.launch_dq(rows, sizes, tile, outputs, d_outputs, dq, workspace, summary)
        return
    q, *keys, document_start = rows
    batch, nq, heads, dim = q.shape
    if not nq:
        return
    block_dim = padded_head_dim(dim)
    launch(
        _dq_kernel, (triton.cdiv(nq, tile.queries), batch * heads),
        *(descriptor(kind, tile.queries, block_dim) for kind in (q, outputs.out, d_outputs.d_out)),
        *(descriptor(kind if kind.shape[1] else q, tile.keys, block_dim) for kind in keys),
        document_start, outputs.lse, d_outputs.d_lse, workspace.lse2, workspace.delta, dq,
        nq, rows.k.shape[1], rows.k_summary.shape[1], sizes.query_start, sizes.key_start, sizes.chunk_start,
        sizes.window, sizes.softmax_scale, sizes.softmax_scale * LOG2E, heads,
        document_start.stride(0) if document_start is not None else 0, workspace.delta.stride(1), *dq.stride()[:3],
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=heads // rows.k.shape[2], D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, HAS_DOCUMENTS=document_start is not None, HAS_DLSE=d_outputs.d_lse is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_dkv(
    rows: Rows, sizes: Sizes, is_text: bool, tile: Tile, d_out: Tensor, gradients: Gradients, workspace: Workspace,
    summary: SummaryBackward | None = None,
) -> None:  # fmt: skip
    """Fill dK and dV of the text keys (is_text) or of the summaries.

    summary: the summary queries, whose part is added (conditions: `launch_forward`).
    """
    k, v, dk, dv, offset, parts = (
        (rows.k, rows.v, gradients.dk, gradients.dv, sizes.key_start, workspace.text_parts)
        if is_text
        else (
            rows.k_summary, rows.v_summary, gradients.dk_summary, gradients.dv_summary, sizes.chunk_start,
            workspace.summary_parts,
        )
    )  # fmt: skip
    if not k.shape[1]:
        return
    if not rows.q.shape[1]:
        call(Tensor.zero_, dk)
        call(Tensor.zero_, dv)
        return
    splits, targets = (parts[0].shape[0], parts) if parts else (1, (dk, dv))
    if tile.specialised:
        from megatron_ksa.kernels.ksa_attention import gluon_dkv

        gluon_dkv.launch_dkv(
            rows.q, d_out, k, v, sizes, offset, is_text, tile, splits, *targets, workspace, summary
        )  # fmt: skip
    else:
        _launch_plain_dkv(
            rows.q, d_out, k, v, rows.document_start, workspace, sizes, offset, is_text, tile, splits, *targets
        )
    # Parts of the queries are summed in float32 in a fixed order: too few keys to fill the GPU, still no atomics.
    for gradient, part in zip((dk, dv), parts or (), strict=bool(parts)):
        call(_sum_parts, gradient, part)


def _sum_parts(gradient: Tensor, parts: Tensor) -> None:
    gradient.copy_(parts.sum(0))


def _launch_plain_dkv(
    q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, workspace: Workspace,
    sizes: Sizes, offset: int, is_text: bool, tile: Tile, splits: int, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """As `launch_dkv`, into dk and dv [B, keys, Hkv, D], or [splits, B, keys, Hkv, D].

    offset: position of the first text key, or chunk of the first summary.
    """
    batch, num_keys, groups, dim = k.shape
    block_dim = padded_head_dim(dim)
    launch(
        _dkv_kernel, (triton.cdiv(num_keys, tile.keys), batch * groups, splits),
        *(descriptor(rows, tile.keys, block_dim) for rows in (k, v)),
        *(descriptor(rows, tile.queries, block_dim) for rows in (q, d_out)),
        *(
            TensorDescriptor(rows, rows.shape, rows.stride(), [1, 1, tile.queries])
            for rows in (workspace.lse2, workspace.delta)
        ),
        document_start, dk, dv,
        q.shape[1], num_keys, sizes.query_start, offset, sizes.window,
        sizes.softmax_scale, sizes.softmax_scale * LOG2E, groups,
        document_start.stride(0) if document_start is not None else 0, *split_strides(dk),
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=q.shape[2] // groups, D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, IS_TEXT=is_text, HAS_DOCUMENTS=document_start is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_backward(
    rows: Rows, sizes: Sizes, tiles: Tiles, outputs: TextOutputs, d_outputs: OutputGradients, gradients: Gradients,
    workspace: Workspace, summary: SummaryBackward | None = None,
) -> None:  # fmt: skip
    """Fill the five gradients, and those of the summary queries where they are given (conditions: `launch_forward`)."""
    launch_dq(rows, sizes, tiles.dq, outputs, d_outputs, gradients.dq, workspace, summary)
    for is_text, tile in ((True, tiles.dkv_text), (False, tiles.dkv_summary)):
        launch_dkv(rows, sizes, is_text, tile, d_outputs.d_out, gradients, workspace, summary)
