"""What the Hopper kernels of KSA attention share: two consumers of 64 rows each, and one warp that feeds them.

A program holds two tiles of queries (of keys, for dK and dV), each with a warpgroup of its own, so that a tile of the
other side is read once for both.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatron_ksa.kernels.ksa_attention.triton_common import key_interval, tile_ranges

WARPS = gl.constexpr(4)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
# Waits for the warps of a partition; Triton 3.8 renamed it.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def deal(item, turn, queue):
    """The producer hands the turn-th work item to the consumers."""
    full, empty, s_items = queue
    slot = turn % 2
    mbarrier.wait(empty.index(slot), free_phase(turn // 2))
    s_items.index(slot).store(gl.full([1], item, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))
    # Every lane stores and one arrives, which vouches for its own store only.
    partition_barrier()
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def take(turn, queue):
    """A consumer's turn-th work item."""
    full, empty, s_items = queue
    slot = turn % 2
    mbarrier.wait(full.index(slot), (turn // 2) & 1)
    item = gl.max(s_items.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)
    mbarrier.arrive(empty.index(slot), count=1)
    return item


@gluon.jit
def following(p_dealt):
    """The producer's next work item: the first one that no program has taken."""
    return gl.num_programs(0) + gl.atomic_add(p_dealt, 1, sem="relaxed")


@gluon.jit
def queue(CONSUMERS: gl.constexpr):
    """A queue of two work items from the producer to the consumers."""
    full, empty = barriers(2, CONSUMERS)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return full, empty, gl.allocate_shared_memory(gl.int32, [2, 1], layout)


@gluon.jit
def place(item, tiles, heads, together):
    """Tile and head of a work item. The tiles of `together` heads take turns, so that the longest are dealt first."""
    first_head = item // (together * tiles) * together
    item -= first_head * tiles
    together = gl.minimum(together, heads - first_head)
    return item // together, first_head + item % together


@gluon.jit
def query_item(item, schedule, BM: gl.constexpr):
    """First query row, and batch x heads, of a work item of two tiles of queries; the last rows are the longest."""
    tiles, heads, together = schedule
    tile, i_bh = place(item, tiles, heads, together)
    return (tiles - 1 - tile) * 2 * BM, i_bh


@gluon.jit
def keys_seen(row, i_b, p_start, stride_start, sizes, C: gl.constexpr, S: gl.constexpr, HAS_DOCUMENTS: gl.constexpr):
    """`key_interval` of the text keys and of the summaries, (lower, upper) each; rows beyond the last count as it."""
    nq, nk, ns, query_start, key_start, chunk_start, window = sizes
    i = query_start + gl.minimum(row, nq - 1)
    start = i * 0
    if HAS_DOCUMENTS:
        start = gl.load(p_start + i_b.to(gl.int64) * stride_start + i)
    text = key_interval(i, start, key_start, nk, window, C, S, True)
    return text, key_interval(i, start, chunk_start, ns, window, C, S, False)


@gluon.jit
def key_tiles(
    i_m, i_b, p_start, stride_start, sizes,
    C: gl.constexpr, S: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The key tiles that 2 * BM queries from row i_m see, in the order of the ring.

    Text tiles up to `cut`, then the summaries, then the other text tiles: so the tiles that one consumer sees are
    neighbours, and the last ones are those beside its queries. Returns how many tiles there are (one at least, seen or
    not), the first one that the second consumer sees, the end of those that the first one sees, and the order for
    `tile_at`.
    """
    i_middle = i_m + BM
    first = keys_seen(i_m, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
    before = keys_seen(i_middle - 1, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
    middle = keys_seen(i_middle, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
    last = keys_seen(i_middle + BM - 1, i_b, p_start, stride_start, sizes, C, S, HAS_DOCUMENTS)
    text = tile_ranges(first[0][0], last[0][0], first[0][1], last[0][1], BN)
    summary = tile_ranges(first[1][0], last[1][0], first[1][1], last[1][1], BN)
    num_text, num_summary = text[3] - text[0], summary[3] - summary[0]
    total = gl.maximum(num_text + num_summary, 1)
    cut = gl.minimum(gl.maximum(gl.cdiv(before[0][1], BN) - 1 - text[0], 0), num_text)
    begin = gl.minimum(gl.maximum(gl.minimum(middle[0][0] // BN - text[0], cut), 0), total - 1)
    return total, begin, gl.minimum(cut + num_summary + 1, total), (cut, cut + num_summary, text, summary)


@gluon.jit
def consumer_item(
    item, schedule, heads, p_start, stride_start, sizes, PART: gl.constexpr,
    C: gl.constexpr, S: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """A work item for one consumer: batch x heads, its first query row, and the key tiles (`key_tiles`).

    Of `total` tiles in the ring, it reads those from `begin` to before `end`.
    """
    i_m, i_bh = query_item(item, schedule, BM)
    total, begin, end, order = key_tiles(i_m, i_bh // heads, p_start, stride_start, sizes, C, S, BM, BN, HAS_DOCUMENTS)
    if PART == 0:
        begin = begin * 0
    else:
        end = total
    return i_bh, i_m + PART * BM, total, begin, end, order


@gluon.jit
def tile_at(tile, order):
    """Whether tile `tile` of the ring is text, its number among its kind, and which numbers need no mask: a range."""
    cut, summaries_end, text, summary = order
    is_text = (tile < cut) | (tile >= summaries_end)
    number = gl.where(tile < cut, text[0] + tile, text[0] + cut + tile - summaries_end)
    number = gl.where(is_text, number, summary[0] + tile - cut)
    return is_text, number, gl.where(is_text, text[1], summary[1]), gl.where(is_text, text[2], summary[2])


@gluon.jit
def barriers(SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of buffers, [SLOTS, 1] each: a slot has been filled; its CONSUMERS have left it."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return full, empty


@gluon.jit
def free_phase(turn):
    """Phase to wait for on the `empty` barrier of a slot that is filled for the turn-th time.

    The first time finds the slot empty: a barrier that never completed passes a wait for the phase before.
    """
    return (turn & 1) ^ 1


@gluon.jit
def load_keys(d_keys, i_b, i_g, total, order, ring, step, BN: gl.constexpr, STAGES: gl.constexpr):
    """Fill the ring of key and value tiles in the order in which the consumers read them; returns the next step."""
    d_k, d_v, d_ks, d_vs = d_keys
    k_full, v_full, k_empty, v_empty, s_k, s_v = ring
    for tile in range(total):
        slot = step % STAGES
        free = free_phase(step // STAGES)
        is_text, number, _, _ = tile_at(tile, order)
        row = number * BN
        bar = k_full.index(slot)
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(bar, d_k.block_type.nbytes)
        tma.async_copy_global_to_shared(d_k, [i_b, i_g, row, 0], bar, s_k.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_ks, [i_b, i_g, row, 0], bar, s_k.index(slot), pred=is_text == 0)
        bar = v_full.index(slot)
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(bar, d_v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_v, [i_b, i_g, row, 0], bar, s_v.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_vs, [i_b, i_g, row, 0], bar, s_v.index(slot), pred=is_text == 0)
        step += 1
    return step


@gluon.jit
def leave(full, empty, step, STAGES: gl.constexpr):
    """A consumer leaves what a step brought to the other one.

    It waits for it all the same: giving a buffer back twice in one turn would count for the other consumer.
    """
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def pass_over(ring, begin, end, STAGES: gl.constexpr):
    """A consumer leaves the key and value tiles of steps [begin, end) to the other one."""
    k_full, v_full, k_empty, v_empty, _, _ = ring
    for step in range(begin, end):
        leave(k_full, k_empty, step, STAGES)
        leave(v_full, v_empty, step, STAGES)


@gluon.jit
def between(o, lower, upper):
    """Whether lower <= o < upper, by one comparison: what is below `lower` wraps around to large numbers."""
    return (o - lower).to(gl.uint32) < gl.maximum(upper - lower, 0).to(gl.uint32)


@gluon.jit
def masked_scores(b_s, tile, order, seen, BN: gl.constexpr):
    """Scores of key tile `tile`, -inf where the query does not see the key; seen: `keys_seen` of the queries."""
    is_text, number, full_first, full_stop = tile_at(tile, order)
    if (number < full_first) | (number >= full_stop):
        o_key = (number * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, b_s.type.layout)))[None, :]
        # One bound after the other: both comparisons at once would not fit in registers.
        b_s = gl.where(o_key >= gl.where(is_text, seen[0][0], seen[1][0])[:, None], b_s, float("-inf"))
        b_s = gl.where(o_key < gl.where(is_text, seen[0][1], seen[1][1])[:, None], b_s, float("-inf"))
    return b_s


@gluon.jit
def store_rows(p, b_rows, s_rows, first, stop, stride_n, D: gl.constexpr):
    """Store a tile [rows, BD] of results as rows first and on of a tensor, those below `stop`, in its dtype.

    By way of s_rows, shared memory of that dtype with as many elements that the copy engine may write to afterwards:
    from where they lie after products, threads would write half a sector each time.
    """
    ROWS: gl.constexpr = b_rows.shape[0]
    BD: gl.constexpr = b_rows.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([BD // 16, 8], [256 // BD, BD // 8], [gl.num_warps(), 1], [1, 0])
    s_rows = s_rows.reshape([ROWS, BD])
    s_rows.store(b_rows.to(s_rows.dtype))
    o_n = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BD, layout=gl.SliceLayout(0, layout))
    m_rows = (o_n < stop)[:, None] & (o_d < D)[None, :]
    gl.store(p + o_n[:, None].to(gl.int64) * stride_n + o_d[None, :], s_rows.load(layout), mask=m_rows)
    fence_async_shared()


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def descriptor(rows: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    """As `triton_common.descriptor`, with the shared-memory layout that Gluon wants named."""
    batch, count, heads, dim = rows.shape
    block = [1, 1, block_rows, block_dim]
    strides = [rows.stride(0), rows.stride(2), rows.stride(1), 1]
    return TensorDescriptor(rows, [batch, heads, count, dim], strides, block, _layout(tuple(block), rows.dtype))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(items: int, device: torch.device) -> int:
    """Programs for `items` work items: one for each multiprocessor. They deal what is beyond among themselves."""
    return min(items, _multiprocessors(device))
