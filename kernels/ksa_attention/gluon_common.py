"""What the Hopper kernels of KSA attention share: two consumers of 64 rows each, and one warp that feeds them.

A program holds two tiles of queries (of keys, for dK and dV), one for each of its two consumers (a warpgroup each), so
that a tile of the other side is read from memory once for both consumers.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatron_ksa.kernels.ksa_attention.gluon_arguments import KeyOrder, Queue
from megatron_ksa.kernels.ksa_attention.triton_common import key_interval, tile_ranges

WARPS = gl.constexpr(4)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
# Waits for all warps of the calling partition; called thread_barrier in Triton 3.6 and barrier in 3.8.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def deal(item, turn, items):
    """The producer hands the turn-th work item to the consumers."""
    slot = turn % 2
    mbarrier.wait(items.empty.index(slot), free_phase(turn // 2))
    items.items.index(slot).store(gl.full([1], item, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))
    # All lanes store, one arrives: without the barrier its arrival would be ordered after its own store only.
    partition_barrier()
    mbarrier.arrive(items.full.index(slot), count=1)


@gluon.jit
def take(turn, items):
    """A consumer's turn-th work item."""
    slot = turn % 2
    mbarrier.wait(items.full.index(slot), (turn // 2) & 1)
    item = gl.max(items.items.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)
    mbarrier.arrive(items.empty.index(slot), count=1)
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
    return Queue(full, empty, gl.allocate_shared_memory(gl.int32, [2, 1], layout))


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
    tile, i_bh = place(item, schedule.tiles, schedule.all_heads, schedule.together)
    return (schedule.tiles - 1 - tile) * 2 * BM, i_bh


@gluon.jit
def keys_seen(row, i_b, starts, sizes, constants):
    """`key_interval` of the text keys and of the summaries, (lower, upper) each; rows beyond the last count as it.

    starts: Documents. sizes: QuerySizes.
    """
    C: gl.constexpr = constants.C
    S: gl.constexpr = constants.S
    i = sizes.query_start + gl.minimum(row, sizes.nq - 1)
    start = i * 0
    if constants.HAS_DOCUMENTS:
        start = gl.load(starts.p + i_b.to(gl.int64) * starts.stride + i)
    text = key_interval(i, start, sizes.key_start, sizes.nk, sizes.window, C, S, True)
    return text, key_interval(i, start, sizes.chunk_start, sizes.ns, sizes.window, C, S, False)


@gluon.jit
def key_tiles(i_m, i_b, starts, sizes, constants):
    """The key tiles that 2 * BM queries from row i_m see, in the order of the ring.

    Text tiles up to `cut`, then the summaries, then the other text tiles: so the tiles that one consumer sees are
    neighbours, and the last ones are those beside its queries. Returns how many tiles there are (one at least, seen or
    not), the first one that the second consumer sees, the end of those that the first one sees, and their KeyOrder.
    """
    BM: gl.constexpr = constants.BM
    BN: gl.constexpr = constants.BN
    i_middle = i_m + BM
    first_text, first_summary = keys_seen(i_m, i_b, starts, sizes, constants)
    before_text, _ = keys_seen(i_middle - 1, i_b, starts, sizes, constants)
    middle_text, _ = keys_seen(i_middle, i_b, starts, sizes, constants)
    last_text, last_summary = keys_seen(i_middle + BM - 1, i_b, starts, sizes, constants)
    text = tile_ranges(first_text[0], last_text[0], first_text[1], last_text[1], BN)
    summary = tile_ranges(first_summary[0], last_summary[0], first_summary[1], last_summary[1], BN)
    num_text, num_summary = text[3] - text[0], summary[3] - summary[0]
    total = gl.maximum(num_text + num_summary, 1)
    cut = gl.minimum(gl.maximum(gl.cdiv(before_text[1], BN) - 1 - text[0], 0), num_text)
    begin = gl.minimum(gl.maximum(gl.minimum(middle_text[0] // BN - text[0], cut), 0), total - 1)
    order = KeyOrder(cut, cut + num_summary, text, summary)
    return total, begin, gl.minimum(cut + num_summary + 1, total), order


@gluon.jit
def consumer_item(item, schedule, heads, starts, sizes, constants, PART: gl.constexpr):
    """A work item for one consumer: batch x heads, its first query row, and the key tiles (`key_tiles`).

    Of `total` tiles in the ring, it reads those from `begin` to before `end`.
    """
    i_m, i_bh = query_item(item, schedule, constants.BM)
    total, begin, end, order = key_tiles(i_m, i_bh // heads, starts, sizes, constants)
    if PART == 0:
        begin = begin * 0
    else:
        end = total
    return i_bh, i_m + PART * constants.BM, total, begin, end, order


@gluon.jit
def tile_at(tile, order):
    """Whether tile `tile` of the ring is of text, its number among its kind, and the range of numbers without mask."""
    text, summary = order.text, order.summary
    is_text = (tile < order.cut) | (tile >= order.summaries_end)
    number = gl.where(tile < order.cut, text[0] + tile, text[0] + order.cut + tile - order.summaries_end)
    number = gl.where(is_text, number, summary[0] + tile - order.cut)
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

    For the first turn the slot is empty already: a wait for the phase before a barrier's first one returns at once.
    """
    return (turn & 1) ^ 1


@gluon.jit
def load_keys(d_keys, i_b, i_g, total, order, ring, step, constants):
    """Fill the KeyRing with tiles in the order in which the consumers read them; returns the next step.

    d_keys: KeyDescriptors.
    """
    for tile in range(total):
        slot = step % constants.STAGES
        free = free_phase(step // constants.STAGES)
        is_text, number, _, _ = tile_at(tile, order)
        row = number * constants.BN
        bar = ring.k_full.index(slot)
        mbarrier.wait(ring.k_empty.index(slot), free)
        mbarrier.expect(bar, d_keys.k.block_type.nbytes)
        tma.async_copy_global_to_shared(d_keys.k, [i_b, i_g, row, 0], bar, ring.k.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_keys.ks, [i_b, i_g, row, 0], bar, ring.k.index(slot), pred=is_text == 0)
        bar = ring.v_full.index(slot)
        mbarrier.wait(ring.v_empty.index(slot), free)
        mbarrier.expect(bar, d_keys.v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_keys.v, [i_b, i_g, row, 0], bar, ring.v.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_keys.vs, [i_b, i_g, row, 0], bar, ring.v.index(slot), pred=is_text == 0)
        step += 1
    return step


@gluon.jit
def leave(full, empty, step, STAGES: gl.constexpr):
    """A consumer leaves the buffer of a step unread, for the other consumer.

    It waits until the buffer is filled all the same: if it arrived on `empty` twice in one turn of the ring, the second
    arrival would count as the other consumer's.
    """
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def pass_over(ring, begin, end, STAGES: gl.constexpr):
    """A consumer leaves the key and value tiles of steps [begin, end) of a KeyRing to the other consumer."""
    for step in range(begin, end):
        leave(ring.k_full, ring.k_empty, step, STAGES)
        leave(ring.v_full, ring.v_empty, step, STAGES)


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
        # Two masks in turn: the results of both comparisons together would not fit in registers.
        b_s = gl.where(o_key >= gl.where(is_text, seen[0][0], seen[1][0])[:, None], b_s, float("-inf"))
        b_s = gl.where(o_key < gl.where(is_text, seen[0][1], seen[1][1])[:, None], b_s, float("-inf"))
    return b_s


@gluon.jit
def store_rows(p, b_rows, s_rows, first, stop, stride_n, D: gl.constexpr):
    """Store a tile [rows, BD] of results as rows first and on of a tensor, those below `stop`, in its dtype.

    The rows go through s_rows, shared memory of that dtype and number of elements: in the layout that matrix products
    leave, neighbouring threads would write 8 channels, of 16-bit results 16 bytes: half a sector. The copy engine may
    write to s_rows afterwards.
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
    """Programs for `items` work items: one for each multiprocessor at most. Each takes further items from a counter."""
    return min(items, _multiprocessors(device))
