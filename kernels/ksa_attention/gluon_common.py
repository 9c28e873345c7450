"""What the Hopper kernels of KSA attention share: two consumers of 64 rows each, and one warp that feeds them.

A program holds two tiles of queries, each with a warpgroup of its own, so that a key tile crosses the L2 cache once
for both. The text tiles and summary tiles that the queries see form one sequence in one ring of buffers.
"""

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


@gluon.jit
def key_tiles(
    first_query, last_query, first_start, last_start, nk, ns, key_start, chunk_start, window,
    C: gl.constexpr, S: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """`tile_ranges` of the text keys and of the summaries that queries [first_query, last_query] see."""
    lower, full_upper = key_interval(first_query, first_start, key_start, nk, window, C, S, True)
    full_lower, upper = key_interval(last_query, last_start, key_start, nk, window, C, S, True)
    text_tiles = tile_ranges(lower, full_lower, full_upper, upper, BN)
    lower, full_upper = key_interval(first_query, first_start, chunk_start, ns, window, C, S, False)
    full_lower, upper = key_interval(last_query, last_start, chunk_start, ns, window, C, S, False)
    return text_tiles, tile_ranges(lower, full_lower, full_upper, upper, BN)


@gluon.jit
def ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring of buffers, [STAGES, 1] each: a slot has been filled; every consumer has left it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def load_keys(
    d_k, d_v, d_ks, d_vs, i_b, i_g, num_text, text_first, summary_first, total, k_full, v_full, k_empty, v_empty,
    s_k, s_v, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: fill the ring of key tiles and of value tiles in the order in which the consumers read them."""
    for tile in range(total):
        slot = tile % STAGES
        # The first round finds every slot empty: a barrier that never completed passes a wait for the phase before.
        free = ((tile // STAGES) & 1) ^ 1
        is_text = tile < num_text
        row = gl.where(is_text, text_first + tile, summary_first + tile - num_text) * BN
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


@gluon.jit
def masked_scores(
    b_s, tile, num_text, text_tiles, summary_tiles, b_text_lower, b_text_upper, b_summary_lower, b_summary_upper,
    BN: gl.constexpr,
):  # fmt: skip
    """Scores of key tile `tile`, -inf where the query does not see the key."""
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, b_s.type.layout))
    if tile < num_text:
        i_n = text_tiles[0] + tile
        if (i_n < text_tiles[1]) | (i_n >= text_tiles[2]):
            o_key = (i_n * BN + o_n)[None, :]
            b_s = gl.where((o_key >= b_text_lower[:, None]) & (o_key < b_text_upper[:, None]), b_s, float("-inf"))
    else:
        i_n = summary_tiles[0] + tile - num_text
        if (i_n < summary_tiles[1]) | (i_n >= summary_tiles[2]):
            o_key = (i_n * BN + o_n)[None, :]
            b_s = gl.where(
                (o_key >= b_summary_lower[:, None]) & (o_key < b_summary_upper[:, None]), b_s, float("-inf")
            )
    return b_s


def descriptor(rows: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    """As `triton_common.descriptor`, with the shared-memory layout that Gluon wants named."""
    batch, count, heads, dim = rows.shape
    block = [1, 1, block_rows, block_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(
        rows, [batch, heads, count, dim], [rows.stride(0), rows.stride(2), rows.stride(1), 1], block, layout
    )
