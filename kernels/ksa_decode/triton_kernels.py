"""Triton kernels of one decoding step's attention; what is computed stands in `reference.py`.

Each kernel reads its sequence's slot and length from the device. Letters: B sequences, rows of a step 1 or 1 + S.
"""

import triton
import triton.language as tl


@triton.jit
def keep_kernel(
    p_k, p_v, p_key_cache, p_value_cache, p_slots, p_starts, ring, summaries,
    stride_kr, stride_kb, stride_kh, stride_vr, stride_vb, stride_vh, stride_slot, stride_group, stride_row,
    C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program copies one new row of one sequence into the cache: text always, a summary if its chunk is complete."""
    i_b = tl.program_id(0).to(tl.int64)
    i_row = tl.program_id(1)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    start = tl.load(p_starts + i_b).to(tl.int32)
    place = start % ring
    kept = True
    if i_row > 0:
        chunk = start // C
        place = ring + chunk * S + i_row - 1
        # A slot that waits at its longest length has a chunk without rows.
        kept = ((start + 1) % C == 0) & ((chunk + 1) * S <= summaries)
    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, BD)
    # [BG, BD]
    mask = kept & (o_g < GROUPS)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + i_row * stride_kr + i_b * stride_kb + o_g[:, None] * stride_kh + o_d[None, :], mask=mask)
    b_v = tl.load(p_v + i_row * stride_vr + i_b * stride_vb + o_g[:, None] * stride_vh + o_d[None, :], mask=mask)
    o_out = slot * stride_slot + o_g[:, None].to(tl.int64) * stride_group + place * stride_row + o_d[None, :]
    tl.store(p_key_cache + o_out, b_k, mask=mask)
    tl.store(p_value_cache + o_out, b_v, mask=mask)


@triton.jit
def attend_tile(b_acc, b_sum, b_max, b_q, b_k, b_v, mask, scale_log2):
    """One tile of an online softmax: mask [BM or 1, BN] is True where a query sees a key."""
    # [BM, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    b_s = tl.where(mask, b_s, float("-inf"))
    # [BM]
    b_next = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_p = tl.math.exp2(b_s - b_next[:, None])
    b_decay = tl.math.exp2(b_max - b_next)
    b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    # [BM, BD]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
    return b_acc, b_sum, b_next


@triton.jit
def text_kernel(
    p_q, p_key_cache, p_value_cache, p_slots, p_starts, p_out, p_part, p_lse2, ring, summaries, window, scale_log2,
    splits, stride_qb, stride_qh, stride_slot, stride_group, stride_row, stride_ob, stride_oh,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The text queries of one K/V head of one sequence over a part of its rows.

    With ROOM the ring has more rows than a window of `window` chunks needs. With SPLIT the part's output
    [B, Hkv, splits, GROUP, D] and log2-sum-exp2 [B, Hkv, splits, GROUP] are float32, for `merge_kernel`; without, the
    output is final.
    """
    i_split = tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    start = tl.load(p_starts + i_b).to(tl.int32)
    # What the query sees: `CacheGeometry.visible`.
    row = start % ring
    turned = start >= ring
    seen = tl.minimum((start // C - window) * S, summaries)
    keys = tl.where(turned, ring + seen, start + 1)
    if ROOM:
        keys = tl.where(turned | (seen > 0), ring + tl.maximum(seen, 0), start + 1)
    hidden_lower = tl.where(turned, row + 1, 0)
    hidden_upper = tl.where(turned, (row // C + 1) * C, 0)
    tiles = tl.cdiv(keys, BN)
    tiles_per_split = tl.cdiv(tiles, splits)
    first = i_split * tiles_per_split
    stop = tl.minimum(first + tiles_per_split, tiles)

    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    m_q = (o_m < GROUP)[:, None] & m_d
    # [BM, BD]
    o_q = (i_g * GROUP + o_m)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + i_b * stride_qb + o_q, mask=m_q, other=0.0)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    # A finite start makes a tile of which nothing is seen add nothing.
    b_max = tl.full([BM], -1.0e30, dtype=tl.float32)
    base = slot * stride_slot + i_g * stride_group
    p_key_cache += base
    p_value_cache += base
    for tile in range(first, stop):
        o_n = tile * BN + tl.arange(0, BN)
        if ROOM:
            age = tl.where(o_n <= row, row - o_n, row - o_n + ring)
            m_n = (o_n < keys) & ((o_n >= ring) | ((age <= start % C + window * C) & (age <= start)))
        else:
            m_n = (o_n < keys) & ((o_n < hidden_lower) | (o_n >= hidden_upper))
        # [BN, BD]; one head's rows of one slot have offsets of 32 bits.
        o_kv = o_n[:, None] * stride_row + o_d[None, :]
        m_kv = m_n[:, None] if BD == D else m_n[:, None] & m_d
        b_k = tl.load(p_key_cache + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_value_cache + o_kv, mask=m_kv, other=0.0)
        b_acc, b_sum, b_max = attend_tile(b_acc, b_sum, b_max, b_q, b_k, b_v, m_n[None, :], scale_log2)

    m_seen = b_sum > 0
    b_safe = tl.where(m_seen, b_sum, 1.0)
    b_out = b_acc / b_safe[:, None]
    if SPLIT:
        i_part = ((i_b * tl.num_programs(1) + i_g) * splits + i_split) * GROUP
        tl.store(p_part + (i_part + o_m)[:, None] * D + o_d[None, :], b_out, mask=m_q)
        b_lse2 = tl.where(m_seen, b_max + tl.math.log2(b_safe), float("-inf"))
        tl.store(p_lse2 + i_part + o_m, b_lse2, mask=o_m < GROUP)
    else:
        o_out = (i_g * GROUP + o_m)[:, None] * stride_oh + o_d[None, :]
        tl.store(p_out + i_b * stride_ob + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)


@triton.jit
def merge_kernel(
    p_part, p_lse2, p_out, splits, stride_ob, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head's output from those of its parts, weighted by their sums of exponentials."""
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(0) // GROUP
    o_s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    i_part = ((i_b * groups + i_h // GROUP) * splits + o_s) * GROUP + i_h % GROUP
    # [BS]; the first part always sees something.
    b_lse2 = tl.load(p_lse2 + i_part, mask=o_s < splits, other=float("-inf"))
    b_weight = tl.math.exp2(b_lse2 - tl.max(b_lse2, axis=0))
    # [BS, BD]
    m_part = (b_weight > 0)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(p_part + i_part[:, None] * D + o_d[None, :], mask=m_part, other=0.0)
    b_out = tl.sum(b_part * b_weight[:, None], axis=0) / tl.sum(b_weight, axis=0)
    tl.store(p_out + i_b * stride_ob + i_h * stride_oh + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def summary_kernel(
    p_q, p_k, p_v, p_key_cache, p_value_cache, p_slots, p_starts, p_out, ring, scale_log2,
    stride_qr, stride_qb, stride_qh, stride_kr, stride_kb, stride_kh, stride_vr, stride_vb, stride_vh,
    stride_slot, stride_group, stride_row, stride_or, stride_ob, stride_oh,
    C: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The S summary queries of one K/V head of one sequence over their chunk's text and each other."""
    i_g = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    row = tl.load(p_starts + i_b).to(tl.int32) % ring
    first = row // C * C
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    i_s = o_m // GROUP
    i_h = i_g * GROUP + o_m % GROUP
    m_m = o_m < S * GROUP
    # [BM, BD]
    o_q = ((1 + i_s) * stride_qr + i_b * stride_qb + i_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_m[:, None] & m_d, other=0.0)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_max = tl.full([BM], -1.0e30, dtype=tl.float32)
    base = slot * stride_slot + i_g * stride_group
    for tile in range(0, tl.cdiv(C, BN)):
        o_n = first + tile * BN + tl.arange(0, BN)
        m_n = o_n <= row
        # [BN, BD]
        o_kv = base + o_n[:, None] * stride_row + o_d[None, :]
        b_k = tl.load(p_key_cache + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        b_v = tl.load(p_value_cache + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        b_acc, b_sum, b_max = attend_tile(b_acc, b_sum, b_max, b_q, b_k, b_v, m_n[None, :], scale_log2)
    o_s = tl.arange(0, BS)
    m_s = (o_s < S)[:, None] & m_d
    # [BS, BD]
    o_k = ((1 + o_s) * stride_kr + i_b * stride_kb + i_g * stride_kh)[:, None] + o_d[None, :]
    o_v = ((1 + o_s) * stride_vr + i_b * stride_vb + i_g * stride_vh)[:, None] + o_d[None, :]
    b_k = tl.load(p_k + o_k, mask=m_s, other=0.0)
    b_v = tl.load(p_v + o_v, mask=m_s, other=0.0)
    m_own = (o_s[None, :] <= i_s[:, None]) & (o_s < S)[None, :]
    b_acc, b_sum, b_max = attend_tile(b_acc, b_sum, b_max, b_q, b_k, b_v, m_own, scale_log2)
    o_out = ((1 + i_s) * stride_or + i_b * stride_ob + i_h * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_out + o_out, (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_m[:, None] & m_d)
