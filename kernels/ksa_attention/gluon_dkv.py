"""dK and dV of `triton_text_backward` in Gluon for Hopper: two tiles of keys in a program share every tile of queries.

Keys and values stay in shared memory; the producer's warp feeds queries, dO, lse and delta through a ring of buffers.
A consumer computes a tile's exponentials while the tensor cores compute dP, and dS while they compute dV; the other
consumer's products fill the gaps that are left. No product may be in flight over the end of the loop: it would need
more registers than there are, and the compiler would then wait after every product. The summary queries that read a
work item's keys come last in it.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatron_ksa.kernels.ksa_attention.gluon_arguments import (
    Constants,
    Documents,
    KeySizes,
    QueryDescriptors,
    QueryRing,
    Schedule,
    Strides,
)
from megatron_ksa.kernels.ksa_attention.gluon_common import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    WARPS,
    barriers,
    between,
    deal,
    descriptor,
    following,
    free_phase,
    leave,
    place,
    programs,
    queue,
    store_rows,
    take,
)
from megatron_ksa.kernels.ksa_attention.operands import Sizes, SummaryBackward
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, query_interval, tile_ranges
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, split_strides
from megatron_ksa.kernels.launch import launch

# Work items of eight heads take turns: the heads' queries share the L2 cache.
HEADS_IN_TURN = 8
STATISTICS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


@gluon.jit
def _readers(key, i_b, stops, sizes, constants, IS_TEXT: gl.constexpr):
    """`query_interval` of key rows, with the end of each position's document looked up instead of searched.

    stops: Documents. sizes: KeySizes.
    """
    C: gl.constexpr = constants.C
    S: gl.constexpr = constants.S
    query_start, nq = sizes.query_start, sizes.nq
    lower, upper = query_interval(key, stops.p, sizes.offset, query_start, nq, sizes.window, C, S, IS_TEXT, False)
    if constants.HAS_DOCUMENTS:
        newest = key + sizes.offset if IS_TEXT else (key // S + sizes.offset) * C + C - 1
        newest = gl.minimum(newest, query_start + nq - 1)
        stop = gl.load(stops.p + i_b.to(gl.int64) * stops.stride + newest) - query_start
        upper = gl.maximum(gl.minimum(upper, stop), lower)
    return lower, upper


@gluon.jit
def _summary_readers(key, sizes, constants, IS_TEXT: gl.constexpr):
    """Summary queries [lower, upper) that see key rows: all of a text key's chunk; of a summary's, from itself on."""
    S: gl.constexpr = constants.S
    count = sizes.summary_queries
    chunk = key // constants.C if IS_TEXT else key // S
    lower = chunk * S if IS_TEXT else key
    return gl.minimum(lower, count), gl.minimum(chunk * S + S, count)


@gluon.jit
def _query_tiles(i_n, i_b, stops, sizes, constants, KEYS: gl.constexpr, IS_TEXT: gl.constexpr):
    """`tile_ranges` of the text queries that see some of the KEYS key rows from i_n on."""
    i_n = gl.minimum(i_n, sizes.num_keys - 1)
    last_key = gl.minimum(i_n + KEYS, sizes.num_keys) - 1
    lower, full_upper = _readers(i_n, i_b, stops, sizes, constants, IS_TEXT)
    full_lower, upper = _readers(last_key, i_b, stops, sizes, constants, IS_TEXT)
    return tile_ranges(lower, full_lower, full_upper, upper, constants.BM)


@gluon.jit
def _summary_tiles(i_n, sizes, constants, KEYS: gl.constexpr, IS_TEXT: gl.constexpr):
    """Tiles [first, stop) of the summary queries that see some of the KEYS key rows from i_n on."""
    BM: gl.constexpr = constants.BM
    i_n = gl.minimum(i_n, sizes.num_keys - 1)
    last_key = gl.minimum(i_n + KEYS, sizes.num_keys) - 1
    lower, _ = _summary_readers(i_n, sizes, constants, IS_TEXT)
    _, upper = _summary_readers(last_key, sizes, constants, IS_TEXT)
    first = lower // BM
    return first, gl.where(upper > lower, gl.cdiv(upper, BM), first)


@gluon.jit
def _key_item(item, schedule, groups, BN: gl.constexpr):
    """A work item: first key row, batch, K/V head, and part of the queries."""
    tile, i_bgs = place(item, schedule.tiles, schedule.all_heads * schedule.splits, schedule.together)
    i_bg = i_bgs // schedule.splits
    return tile * 2 * BN, i_bg // groups, i_bg % groups, i_bgs % schedule.splits


@gluon.jit
def _part(tiles, i_s, splits):
    """The i_s-th part of the query tiles [first, stop)."""
    first, _, _, stop = tiles
    part = gl.cdiv(stop - first, splits)
    first = gl.minimum(first + i_s * part, stop)
    return first, gl.minimum(first + part, stop)


@gluon.jit
def _load_queries(d_rows, i_b, i_h, first, stop, ring, step, BM: gl.constexpr, STAGES: gl.constexpr):
    """Fill the QueryRing with the query tiles [first, stop), the last one first; returns the next step.

    d_rows: QueryDescriptors.
    """
    for i_m in range(stop - first):
        row = (stop - 1 - i_m) * BM
        slot = step % STAGES
        bar = ring.full.index(slot)
        mbarrier.wait(ring.empty.index(slot), free_phase(step // STAGES))
        mbarrier.expect(bar, 2 * (d_rows.q.block_type.nbytes + d_rows.lse2.block_type.nbytes))
        tma.async_copy_global_to_shared(d_rows.q, [i_b, i_h, row, 0], bar, ring.q.index(slot))
        tma.async_copy_global_to_shared(d_rows.lse2, [i_b, i_h, row], bar, ring.lse2.index(slot))
        tma.async_copy_global_to_shared(d_rows.do, [i_b, i_h, row, 0], bar, ring.do.index(slot))
        tma.async_copy_global_to_shared(d_rows.delta, [i_b, i_h, row], bar, ring.delta.index(slot))
        step += 1
    return step


@gluon.jit
def _load(
    d_k, d_v, d_rows, d_summary, s_k, s_v, keys_full, keys_empty, ring, items, p_dealt, stops, sizes, schedule, groups,
    constants, IS_TEXT: gl.constexpr,
):  # fmt: skip
    """The producer: keys and values of a work item, then its query tiles of every query head."""
    GROUP: gl.constexpr = constants.GROUP
    BM: gl.constexpr = constants.BM
    BN: gl.constexpr = constants.BN
    STAGES: gl.constexpr = constants.STAGES
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < schedule.tiles * schedule.all_heads * schedule.splits:
        deal(item, turn, items)
        i_n, i_b, i_g, i_s = _key_item(item, schedule, groups, BN)
        tiles = _query_tiles(i_n, i_b, stops, sizes, constants, 2 * BN, IS_TEXT)
        first, stop = _part(tiles, i_s, schedule.splits)
        for part in gl.static_range(2):
            bar = keys_full.index(part)
            mbarrier.wait(keys_empty.index(part), free_phase(turn))
            mbarrier.expect(bar, 2 * d_k.block_type.nbytes)
            tma.async_copy_global_to_shared(d_k, [i_b, i_g, i_n + part * BN, 0], bar, s_k.index(part))
            tma.async_copy_global_to_shared(d_v, [i_b, i_g, i_n + part * BN, 0], bar, s_v.index(part))
        after = following(p_dealt)
        for i_q in range(GROUP):
            step = _load_queries(d_rows, i_b, i_g * GROUP + i_q, first, stop, ring, step, BM, STAGES)
        if constants.HAS_SUMMARIES:
            if i_s == 0:
                first, stop = _summary_tiles(i_n, sizes, constants, 2 * BN, IS_TEXT)
                for i_q in range(GROUP):
                    step = _load_queries(d_summary, i_b, i_g * GROUP + i_q, first, stop, ring, step, BM, STAGES)
        turn += 1
        item = after
    deal(item, turn, items)


@gluon.jit
def _pass_over(ring, begin, end, STAGES: gl.constexpr):
    """A consumer leaves the query tiles of steps [begin, end) of a QueryRing to the other consumer."""
    for step in range(begin, end):
        leave(ring.full, ring.empty, step, STAGES)


@gluon.jit
def _accumulate(
    b_k, b_v, b_dk, b_dv, ring, before, first, stop, seen, b_lower, b_upper, scale_log2,
    BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV [BN, BD] with what one head's query tiles [first, stop) add, the last tile first.

    before: steps of the ring before those tiles. seen: `tile_ranges` of the query tiles that see some of the keys. Key
    row j is seen by queries b_lower[j] to b_upper[j] - 1.
    """
    BN: gl.constexpr = b_k.shape[0]
    BD: gl.constexpr = b_k.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    left: gl.constexpr = gl.DotOperandLayout(0, b_dk.type.layout, 2)
    b_zero = gl.zeros([BN, BM], gl.float32, layout=scores)
    seen_stop = gl.maximum(gl.minimum(seen[3], stop), first)
    begin = stop - seen_stop
    end = stop - gl.minimum(gl.maximum(seen[0], first), seen_stop)
    _pass_over(ring, before, before + begin, STAGES)
    for i_m in range(begin, end):
        tile = stop - 1 - i_m
        slot = (before + i_m) % STAGES
        # [BM, BD]
        b_q = ring.q.index(slot).reshape([BM, BD])
        b_do = ring.do.index(slot).reshape([BM, BD])
        # [BN, BM]
        mbarrier.wait(ring.full.index(slot), ((before + i_m) // STAGES) & 1)
        b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_dp = warpgroup_mma(b_v, b_do.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_lse2 = ring.lse2.index(slot).reshape([BM]).load(columns)
        b_p = gl.exp2(b_s * scale_log2 - b_lse2[None, :])
        if (tile < seen[1]) | (tile >= seen[2]):
            o_m = tile * BM + gl.arange(0, BM, layout=columns)
            b_p = gl.where(between(o_m[None, :], b_lower[:, None], b_upper[:, None]), b_p, 0.0)
        b_dv = warpgroup_mma(gl.convert_layout(b_p.to(b_k.dtype), left), b_do, b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_delta = ring.delta.index(slot).reshape([BM]).load(columns)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = warpgroup_mma(gl.convert_layout(b_ds.to(b_k.dtype), left), b_q, b_dk, is_async=True)
        b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))
        mbarrier.arrive(ring.empty.index(slot), count=1)
    _pass_over(ring, before + end, before + stop - first, STAGES)
    return b_dk, b_dv


@gluon.jit
def _consume(
    s_k, s_v, s_out, keys_full, keys_empty, ring, items, stops, p_dk, p_dv, stride_split, out_strides, sizes, schedule,
    groups, scale, scale_log2, constants, PART: gl.constexpr, IS_TEXT: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: dK and dV of BN keys of every work item. out_strides: of p_dk and p_dv."""
    C: gl.constexpr = constants.C
    D: gl.constexpr = constants.D
    BD: gl.constexpr = constants.BD
    BM: gl.constexpr = constants.BM
    BN: gl.constexpr = constants.BN
    STAGES: gl.constexpr = constants.STAGES
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    # [BN, BD]
    b_k = s_k.index(PART).reshape([BN, BD])
    b_v = s_v.index(PART).reshape([BN, BD])
    # Steps of the ring before the next query tile.
    before = 0
    turn = 0
    item = take(turn, items)
    while item < schedule.tiles * schedule.all_heads * schedule.splits:
        i_n, i_b, i_g, i_s = _key_item(item, schedule, groups, BN)
        i_part = i_n + PART * BN
        tiles = _query_tiles(i_n, i_b, stops, sizes, constants, 2 * BN, IS_TEXT)
        first, stop = _part(tiles, i_s, schedule.splits)
        seen = _query_tiles(i_part, i_b, stops, sizes, constants, BN, IS_TEXT)
        # [BN]; rows beyond the last key are not stored.
        o_n = gl.minimum(i_part + gl.arange(0, BN, layout=gl.SliceLayout(1, scores)), sizes.num_keys - 1)
        b_lower, b_upper = _readers(o_n, i_b, stops, sizes, constants, IS_TEXT)
        # [BN, BD]
        b_dk = gl.zeros([BN, BD], gl.float32, layout=output)
        b_dv = gl.zeros([BN, BD], gl.float32, layout=output)
        mbarrier.wait(keys_full.index(PART), turn & 1)
        for _ in range(constants.GROUP):
            b_dk, b_dv = _accumulate(
                b_k, b_v, b_dk, b_dv, ring, before, first, stop, seen, b_lower, b_upper, scale_log2, BM, STAGES
            )
            before += stop - first
        if constants.HAS_SUMMARIES:
            if i_s == 0:
                first, stop = _summary_tiles(i_n, sizes, constants, 2 * BN, IS_TEXT)
                part_first, part_stop = _summary_tiles(i_part, sizes, constants, BN, IS_TEXT)
                # Every tile of summary queries needs the mask: the range without one is empty.
                summary_seen = (part_first, part_stop, part_stop, part_stop)
                b_lower, b_upper = _summary_readers(o_n, sizes, constants, IS_TEXT)
                if constants.HAS_DOCUMENTS and IS_TEXT:
                    # The summaries belong to the document of the chunk's last token.
                    b_stop = gl.load(stops.p + i_b.to(gl.int64) * stops.stride + gl.minimum(o_n, sizes.nq - 1))
                    b_upper = gl.where(b_stop >= o_n // C * C + C, b_upper, b_lower)
                for _ in range(constants.GROUP):
                    b_dk, b_dv = _accumulate(
                        b_k, b_v, b_dk, b_dv, ring, before, first, stop, summary_seen, b_lower, b_upper, scale_log2,
                        BM, STAGES,
                    )  # fmt: skip
                    before += stop - first
        mbarrier.arrive(keys_empty.index(PART), count=1)
        o_head = i_s.to(gl.int64) * stride_split + i_b.to(gl.int64) * out_strides.batch
        o_head += i_g.to(gl.int64) * out_strides.head
        store_rows(p_dk + o_head, b_dk * scale, s_out.index(PART), i_part, sizes.num_keys, out_strides.row, D)
        store_rows(p_dv + o_head, b_dv, s_out.index(PART), i_part, sizes.num_keys, out_strides.row, D)
        turn += 1
        item = take(turn, items)


@gluon.jit
def _dkv_kernel(
    d_k, d_v, d_q, d_do, d_lse2, d_delta, d_summary_q, d_summary_do, d_summary_lse2, d_summary_delta, p_dealt, p_stop,
    p_dk, p_dv, nq, summary_queries, num_keys, query_start, offset, window, scale, scale_log2, groups, tiles, all_heads,
    together, splits, stride_stop, stride_split, stride_b, stride_n, stride_g,
    C: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, IS_TEXT: gl.constexpr, HAS_SUMMARIES: gl.constexpr,
    HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """dK and dV of the text keys (IS_TEXT) or of the summaries, summed over the query heads that read them.

    A work item is two tiles of BN keys and one part in `splits` of the queries, written to its own slice of dk and dv;
    the first part has the summary queries too (HAS_SUMMARIES).
    """
    s_k = gl.allocate_shared_memory(d_k.dtype, [2] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [2] + d_v.block_type.shape, d_v.layout)
    s_q = gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_q.block_type.shape, d_q.layout)
    s_do = gl.allocate_shared_memory(d_do.dtype, [STAGES] + d_do.block_type.shape, d_do.layout)
    s_lse2 = gl.allocate_shared_memory(gl.float32, [STAGES] + d_lse2.block_type.shape, d_lse2.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES] + d_delta.block_type.shape, d_delta.layout)
    out_type: gl.constexpr = p_dk.dtype.element_ty
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BD], out_type)
    s_out = gl.allocate_shared_memory(out_type, [2, BN, BD], out_layout)
    keys_full, keys_empty = barriers(2, 1)
    full, empty = barriers(STAGES, 2)
    items = queue(2)
    ring = QueryRing(full, empty, s_q, s_do, s_lse2, s_delta)
    sizes = KeySizes(nq, summary_queries, num_keys, query_start, offset, window)
    schedule = Schedule(tiles, all_heads, together, splits)
    stops = Documents(p_stop, stride_stop)
    out_strides = Strides(stride_b, stride_n, stride_g)
    d_rows = QueryDescriptors(d_q, d_do, d_lse2, d_delta)
    d_summary = QueryDescriptors(d_summary_q, d_summary_do, d_summary_lse2, d_summary_delta)
    gl.warp_specialize(
        [
            (_consume, (
                s_k, s_v, s_out, keys_full, keys_empty, ring, items, stops, p_dk, p_dv, stride_split, out_strides,
                sizes, schedule, groups, scale, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 0, IS_TEXT,
            )),
            (_consume, (
                s_k, s_v, s_out, keys_full, keys_empty, ring, items, stops, p_dk, p_dv, stride_split, out_strides,
                sizes, schedule, groups, scale, scale_log2,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), 1, IS_TEXT,
            )),
            (_load, (
                d_k, d_v, d_rows, d_summary, s_k, s_v, keys_full, keys_empty, ring, items, p_dealt, stops, sizes,
                schedule, groups,
                Constants(C, S, GROUP, D, BD, BM, BN, STAGES, HAS_SUMMARIES, HAS_DOCUMENTS), IS_TEXT,
            )),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _statistics(rows: Tensor, block_rows: int) -> TensorDescriptor:
    """A descriptor of float32 [B, Hq, nq] rows, read in blocks of [1, 1, block_rows]."""
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, 1, block_rows], STATISTICS)


def launch_dkv(
    q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, sizes: Sizes, offset: int, is_text: bool, tile: Tile, splits: int,
    dk: Tensor, dv: Tensor, workspace: Workspace, summary: SummaryBackward | None,
) -> None:  # fmt: skip
    """As `triton_text_backward.launch_dkv`, for bfloat16 and float16, with the keys of one kind.

    offset: position of the first text key, or chunk of the first summary.
    dk, dv: with a dimension of splits in front where splits > 1.
    """
    batch, num_keys, groups, dim = k.shape
    block_dim = padded_head_dim(dim)
    tiles = triton.cdiv(num_keys, 2 * tile.keys)
    document_stop = workspace.document_stop

    def queries(q: Tensor, d_out: Tensor, lse2: Tensor, delta: Tensor) -> list[TensorDescriptor]:
        d_rows = [descriptor(t, tile.queries, block_dim) for t in (q, d_out)]
        return d_rows + [_statistics(t, tile.queries) for t in (lse2, delta)]

    d_summary, summary_queries = [None] * 4, 0
    if summary is not None:
        d_summary = queries(summary.q, summary.d_out, workspace.summary_lse2, workspace.summary_delta)
        summary_queries = summary.q.shape[1]
    launch(
        _dkv_kernel, (programs(tiles * batch * groups * splits, q.device),),
        *(descriptor(rows, tile.keys, block_dim) for rows in (k, v)),
        *queries(q, d_out, workspace.lse2, workspace.delta), *d_summary,
        workspace.dealt_text if is_text else workspace.dealt_summary, document_stop, dk, dv,
        q.shape[1], summary_queries, num_keys, sizes.query_start, offset, sizes.window,
        sizes.softmax_scale, sizes.softmax_scale * LOG2E, groups, tiles, batch * groups, HEADS_IN_TURN, splits,
        document_stop.stride(0) if document_stop is not None else 0, *split_strides(dk),
        C=sizes.chunk_size, S=sizes.summary_tokens, GROUP=q.shape[2] // groups, D=dim, BD=block_dim,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, IS_TEXT=is_text, HAS_SUMMARIES=summary is not None,
        HAS_DOCUMENTS=document_stop is not None, num_warps=WARPS.value,
    )  # fmt: skip
