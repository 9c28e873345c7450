"""What the Hopper kernels of KSA attention share: two consumers of 64 rows each, and one warp that feeds them.

A program holds two tiles of queries (of keys, for dK and dV), each with a warpgroup of its own, so that a tile of the
other XX
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
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
def key_tiles(
    i_m, i_b, p_start, stride_start, sizes,
    C: gl.constexpr, S: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """`tile_ranges` of the text keys and of the summaries that 2 * BM queries from row i_m see.

    Returns the number of text tiles, the number of tiles in all, and both ranges.
    """
    nq, nk, ns, query_start, key_start, chunk_start, window = sizes
    first_query = query_start + i_m
    last_query = query_start + gl.minimum(i_m + 2 * BM, nq) - 1
    if HAS_DOCUMENTS:
        p_start += i_b.to(gl.int64) * stride_start
        first_start = gl.load(p_start + first_query)
        last_start = gl.load(p_start + last_query)
    else:
        first_start = 0
        last_start = 0
    lower, full_upper = key_interval(first_query, first_start, key_start, nk, window, C, S, True)
    full_lower, upper = key_interval(last_query, last_start, key_start, nk, window, C, S, True)
    text_tiles = tile_ranges(lower, full_lower, full_upper, upper, BN)
    lower, full_upper = key_interval(first_query, first_start, chunk_start, ns, window, C, S, False)
    full_lower, upper = key_interval(last_query, last_start, chunk_start, ns, window, C, S, False)
    summary_tiles = tile_ranges(lower, full_lower, full_upper, upper, BN)
    num_text = text_tiles[3] - text_tiles[0]
    return num_text, num_text + summary_tiles[3] - summary_tiles[0], text_tiles, summary_tiles


@gluon.jit
def row_intervals(
    o_m, i_b, p_start, stride_start, sizes, C: gl.constexpr, S: gl.constexpr, HAS_DOCUMENTS: gl.constexpr
):  # fmt: skip
    """`key_interval` of the text keys and of the summaries, for each of the query rows o_m."""
    nq, nk, ns, query_start, key_start, chunk_start, window = sizes
    o_i = query_start + o_m
    if HAS_DOCUMENTS:
        b_start = gl.load(p_start + i_b.to(gl.int64) * stride_start + o_i, mask=o_m < nq, other=0)
    else:
        b_start = gl.zeros_like(o_m)
    text = key_interval(o_i, b_start, key_start, nk, window, C, S, True)
    return text, key_interval(o_i, b_start, chunk_start, ns, window, C, S, False)


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
def load_keys(
    d_keys, i_b, i_g, num_text, total, text_tiles, summary_tiles, ring, step, BN: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Fill the ring of key and value tiles in the order in which the consumers read them; returns the next step."""
    d_k, d_v, d_ks, d_vs = d_keys
    k_full, v_full, k_empty, v_empty, s_k, s_v = ring
    for tile in range(total):
        slot = step % STAGES
        free = free_phase(step // STAGES)
        is_text = tile < num_text
        row = gl.where(is_text, text_tiles[0] + tile, summary_tiles[0] + tile - num_text) * BN
        bar = k_full.index(slot)
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(bar, d_k.block_type.nbytes)
        tma.async_copy_global_to_shared(d_k, [i_b, i_g, row, 0], bar, s_k.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_ks, [i_b, i_g, row, 0], bar, s_k.index(slot), pred=tile >= num_text)
        bar = v_full.index(slot)
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(bar, d_v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_v, [i_b, i_g, row, 0], bar, s_v.index(slot), pred=is_text)
        tma.async_copy_global_to_shared(d_vs, [i_b, i_g, row, 0], bar, s_v.index(slot), pred=tile >= num_text)
        step += 1
    return step


@gluon.jit
def masked_scores(b_s, tile, num_text, text_tiles, summary_tiles, text_interval, summary_interval, BN: gl.constexpr):
    """Scores of key tile `tile`, -inf where the query does not see the key."""
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, b_s.type.layout))
    if tile < num_text:
        i_n = text_tiles[0] + tile
        if (i_n < text_tiles[1]) | (i_n >= text_tiles[2]):
            o_key = (i_n * BN + o_n)[None, :]
            m_seen = (o_key >= text_interval[0][:, None]) & (o_key < text_interval[1][:, None])
            b_s = gl.where(m_seen, b_s, float("-inf"))
    else:
        i_n = summary_tiles[0] + tile - num_text
        if (i_n < summary_tiles[1]) | (i_n >= summary_tiles[2]):
            o_key = (i_n * BN + o_n)[None, :]
            m_seen = (o_key >= summary_interval[0][:, None]) & (o_key < summary_interval[1][:, None])
            b_s = gl.where(m_seen, b_s, float("-inf"))
    return b_s


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
