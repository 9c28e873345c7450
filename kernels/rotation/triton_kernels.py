"""Triton kernels of the norm and rotation of query and key heads; formulas in `reference.py`.

A program takes one K/V group over some rows: its query heads, its key head and its value head, which is copied. The
sines and cosines of a row are formed once for the group, in the kernel, from the position and the group's frequencies.
"""

import triton
import triton.language as tl


@triton.jit
def cos_sin(p_positions, p_frequencies, o_row, m_row, stride_position, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Cosines and sines, float32 [R, BLOCK_HALF], of position * frequency in turns, for the group at p_frequencies.

    The top 31 bits below half a turn make t in [-1/4, 1/4], on which polynomials err by less than 1e-8; the half turn
    that is left flips both signs.
    """
    o_half = tl.arange(0, BLOCK_HALF)
    # [R]
    b_position = tl.load(p_positions + o_row * stride_position, mask=m_row, other=0).to(tl.int64)
    # [BLOCK_HALF], in units of 2^-64 turn
    b_frequency = tl.load(p_frequencies + o_half, mask=o_half < HALF, other=0)
    # [R, BLOCK_HALF], in units of 2^-32 turn
    b_phase = ((b_position[:, None] * b_frequency[None, :]) >> 32).to(tl.int32)
    b_turn = ((b_phase << 1) >> 1).to(tl.float32) * (1.0 / 4294967296.0)
    b_sign = tl.where((b_phase ^ (b_phase << 1)) < 0, -1.0, 1.0)
    b_square = b_turn * b_turn
    # Interpolation at Chebyshev nodes of sin(2 pi t) / t and cos(2 pi t) in t^2.
    b_sin = 39.76072207660238 * b_square - 76.5812845594965
    b_sin = b_sin * b_square + 81.60248074287298
    b_sin = b_sin * b_square - 41.34168066806326
    b_sin = b_sin * b_square + 6.283185280261414
    b_cos = -24.98183619588351 * b_square + 60.143952346461944
    b_cos = b_cos * b_square - 85.45356819573077
    b_cos = b_cos * b_square + 64.93934655291106
    b_cos = b_cos * b_square - 19.739208548315357
    b_cos = b_cos * b_square + 1.0
    return b_cos * b_sign, b_sin * (b_turn * b_sign)


@triton.jit
def load_head(
    p, o_row, m_row, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The channels of heads at p + o_row in float32: pairs [R, BLOCK_HALF] twice, and the rest [R, BLOCK_PASS]."""
    o_half = tl.arange(0, BLOCK_HALF)
    if INTERLEAVED:
        o_pair = tl.arange(0, 2 * BLOCK_HALF)
        m_pair = m_row[:, None] & (o_pair < 2 * HALF)[None, :]
        b_pair = tl.load(p + o_row[:, None] + o_pair[None, :], mask=m_pair, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_pair, (b_pair.shape[0], BLOCK_HALF, 2)))
    else:
        m_half = m_row[:, None] & (o_half < HALF)[None, :]
        p_a = p + o_row[:, None] + o_half[None, :]
        b_a = tl.load(p_a, mask=m_half, other=0.0).to(tl.float32)
        b_b = tl.load(p_a + HALF, mask=m_half, other=0.0).to(tl.float32)
    if PASS > 0:
        o_pass = tl.arange(0, BLOCK_PASS)
        m_pass = m_row[:, None] & (o_pass < PASS)[None, :]
        b_rest = tl.load(p + o_row[:, None] + 2 * HALF + o_pass[None, :], mask=m_pass, other=0.0).to(tl.float32)
    else:
        b_rest = tl.zeros_like(b_a)
    return b_a, b_b, b_rest


@triton.jit
def store_head(
    p, b_a, b_b, b_rest, o_row, m_row, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_head`, in the dtype of p."""
    o_half = tl.arange(0, BLOCK_HALF)
    dtype = p.dtype.element_ty
    if INTERLEAVED:
        o_pair = tl.arange(0, 2 * BLOCK_HALF)
        m_pair = m_row[:, None] & (o_pair < 2 * HALF)[None, :]
        b_pair = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0], 2 * BLOCK_HALF))
        tl.store(p + o_row[:, None] + o_pair[None, :], b_pair.to(dtype), mask=m_pair)
    else:
        m_half = m_row[:, None] & (o_half < HALF)[None, :]
        p_a = p + o_row[:, None] + o_half[None, :]
        tl.store(p_a, b_a.to(dtype), mask=m_half)
        tl.store(p_a + HALF, b_b.to(dtype), mask=m_half)
    if PASS > 0:
        o_pass = tl.arange(0, BLOCK_PASS)
        m_pass = m_row[:, None] & (o_pass < PASS)[None, :]
        tl.store(p + o_row[:, None] + 2 * HALF + o_pass[None, :], b_rest.to(dtype), mask=m_pass)


@triton.jit
def load_gain(
    p_weight, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """The norm's gain as one row of `load_head`."""
    o_row = tl.zeros((1,), tl.int64)
    b_a, b_b, b_rest = load_head(p_weight, o_row, o_row == 0, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED)
    if ZERO_CENTERED:
        b_a, b_b, b_rest = b_a + 1.0, b_b + 1.0, b_rest + 1.0
    return b_a, b_b, b_rest


@triton.jit
def mean(b_a, b_b, b_rest, HALF: tl.constexpr, PASS: tl.constexpr):
    """[R, 1] means over the channels."""
    b_sum = tl.sum(b_a + b_b, axis=1)
    if PASS > 0:
        b_sum += tl.sum(b_rest, axis=1)
    return (b_sum * (1.0 / (2 * HALF + PASS)))[:, None]


@triton.jit
def forward_head(
    p_x, p_out, b_cos, b_sin, b_gain_a, b_gain_b, b_gain_rest, o_x, o_out, m_row, eps, HALF: tl.constexpr,
    PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """out = rotation(norm(x)) of one head over R rows."""
    b_a, b_b, b_rest = load_head(p_x, o_x, m_row, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED)
    if NORM:
        b_rstd = tl.rsqrt(mean(b_a * b_a, b_b * b_b, b_rest * b_rest, HALF, PASS) + eps)
        b_a, b_b, b_rest = b_a * b_rstd * b_gain_a, b_b * b_rstd * b_gain_b, b_rest * b_rstd * b_gain_rest
    store_head(
        p_out, b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin, b_rest, o_out, m_row, HALF, PASS, BLOCK_HALF,
        BLOCK_PASS, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def backward_head(
    p_x, p_dout, p_dx, b_cos, b_sin, b_gain_a, b_gain_b, b_gain_rest, o_x, o_dout, o_dx, m_row, eps,
    HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dx of one head over R rows; returns the terms [R, ...] of the gain's gradient."""
    # dn = rotation by -theta of dout
    b_da, b_db, b_drest = load_head(p_dout, o_dout, m_row, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED)
    b_da, b_db = b_da * b_cos + b_db * b_sin, b_db * b_cos - b_da * b_sin
    b_a, b_b, b_rest = b_da, b_db, b_drest
    if NORM:
        b_a, b_b, b_rest = load_head(p_x, o_x, m_row, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED)
        b_rstd = tl.rsqrt(mean(b_a * b_a, b_b * b_b, b_rest * b_rest, HALF, PASS) + eps)
        # x^ = x / rms, dgain = dn x^, dx = (dn gain - x^ mean(dn gain x^)) / rms
        b_a, b_b, b_rest = b_a * b_rstd, b_b * b_rstd, b_rest * b_rstd
        b_gain_da, b_gain_db, b_gain_drest = b_da * b_a, b_db * b_b, b_drest * b_rest
        b_mean = mean(b_gain_da * b_gain_a, b_gain_db * b_gain_b, b_gain_drest * b_gain_rest, HALF, PASS)
        b_da = (b_da * b_gain_a - b_a * b_mean) * b_rstd
        b_db = (b_db * b_gain_b - b_b * b_mean) * b_rstd
        b_drest = (b_drest * b_gain_rest - b_rest * b_mean) * b_rstd
        b_a, b_b, b_rest = b_gain_da, b_gain_db, b_gain_drest
    store_head(p_dx, b_da, b_db, b_drest, o_dx, m_row, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED)
    return b_a, b_b, b_rest


@triton.jit
def copy_head(p, p_out, o_row, o_out, m_row, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Copy one head over R rows."""
    o_dim = tl.arange(0, BLOCK_DIM)
    m_head = m_row[:, None] & (o_dim < DIM)[None, :]
    b_head = tl.load(p + o_row[:, None] + o_dim[None, :], mask=m_head, other=0.0)
    tl.store(p_out + o_out[:, None] + o_dim[None, :], b_head, mask=m_head)


@triton.jit
def rotate_forward_kernel(
    p_mixed, p_q_weight, p_k_weight, p_positions, p_frequencies, p_q_out, p_k_out, p_v_out,
    rows, groups, stride_position_row, stride_position_batch, stride_frequency,
    stride_row, stride_batch, stride_group, stride_qo_row, stride_qo_batch, stride_ko_row, stride_ko_batch, eps,
    QUERIES: tl.constexpr, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """The heads of one group over BLOCK_ROWS rows; grid (groups * tiles, batch). Heads of a row are contiguous."""
    DIM: tl.constexpr = 2 * HALF + PASS
    i_group, i_tile, i_batch = tl.program_id(0) % groups, tl.program_id(0) // groups, tl.program_id(1).to(tl.int64)
    o_row = i_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < rows
    b_cos, b_sin = cos_sin(
        p_positions + i_batch * stride_position_batch, p_frequencies + i_group * stride_frequency, o_row, m_row,
        stride_position_row, HALF, BLOCK_HALF,
    )  # fmt: skip
    b_gain_a, b_gain_b, b_gain_rest = b_cos, b_cos, b_cos
    if NORM:
        b_gain_a, b_gain_b, b_gain_rest = load_gain(
            p_q_weight, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, ZERO_CENTERED
        )
    p_mixed += i_batch * stride_batch + i_group.to(tl.int64) * stride_group
    p_q_out += i_batch * stride_qo_batch + i_group * QUERIES * DIM
    o_mixed, o_ko = o_row * stride_row, o_row * stride_ko_row
    for i_query in range(QUERIES):
        forward_head(
            p_mixed + i_query * DIM, p_q_out + i_query * DIM, b_cos, b_sin, b_gain_a, b_gain_b, b_gain_rest,
            o_mixed, o_row * stride_qo_row, m_row, eps, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, NORM,
        )  # fmt: skip
    if NORM:
        b_gain_a, b_gain_b, b_gain_rest = load_gain(
            p_k_weight, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, ZERO_CENTERED
        )
    o_key = i_batch * stride_ko_batch + i_group * DIM
    forward_head(
        p_mixed + QUERIES * DIM, p_k_out + o_key, b_cos, b_sin, b_gain_a, b_gain_b, b_gain_rest, o_mixed, o_ko, m_row,
        eps, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, NORM,
    )  # fmt: skip
    copy_head(p_mixed + (QUERIES + 1) * DIM, p_v_out + o_key, o_mixed, o_ko, m_row, DIM, BLOCK_DIM)


@triton.jit
def rotate_backward_kernel(
    p_mixed, p_q_weight, p_k_weight, p_positions, p_frequencies, p_dq_out, p_dk_out, p_dv_out, p_dmixed, p_dgain,
    rows, groups, tiles, tiles_per_program, stride_position_row, stride_position_batch, stride_frequency,
    stride_row, stride_batch, stride_group, stride_dqo_row, stride_dqo_batch, stride_dqo_head,
    stride_dko_row, stride_dko_batch, stride_dko_head, stride_dvo_row, stride_dvo_batch, stride_dvo_head,
    stride_d_row, stride_d_batch, stride_d_group, eps,
    QUERIES: tl.constexpr, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """Gradients of the heads of one group over several tiles of rows; grid (groups * programs, batch).

    p_dgain: float32 [programs of both axes, 2, 2 * HALF + PASS], each program's part of the gains' gradients.
    """
    DIM: tl.constexpr = 2 * HALF + PASS
    i_group, i_part, i_batch = tl.program_id(0) % groups, tl.program_id(0) // groups, tl.program_id(1).to(tl.int64)
    p_positions += i_batch * stride_position_batch
    p_frequencies += i_group * stride_frequency
    i_wide = i_group.to(tl.int64)
    p_mixed += i_batch * stride_batch + i_wide * stride_group
    p_dmixed += i_batch * stride_d_batch + i_wide * stride_d_group
    p_dq_out += i_batch * stride_dqo_batch + i_wide * QUERIES * stride_dqo_head
    p_dk_out += i_batch * stride_dko_batch + i_wide * stride_dko_head
    p_dv_out += i_batch * stride_dvo_batch + i_wide * stride_dvo_head
    # Without a norm these are handed through and not read.
    b_zero = tl.zeros((BLOCK_ROWS, BLOCK_HALF), tl.float32)
    b_q_a, b_q_b, b_q_rest, b_k_a, b_k_b, b_k_rest = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    if NORM:
        b_q_a, b_q_b, b_q_rest = load_gain(p_q_weight, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, ZERO_CENTERED)
        b_k_a, b_k_b, b_k_rest = load_gain(p_k_weight, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, ZERO_CENTERED)
    b_dq_a, b_dq_b, b_dk_a, b_dk_b = b_zero, b_zero, b_zero, b_zero
    if PASS > 0:
        b_dq_rest = tl.zeros((BLOCK_ROWS, BLOCK_PASS), tl.float32)
    else:
        b_dq_rest = b_zero
    b_dk_rest = b_dq_rest
    first = i_part * tiles_per_program
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        o_row = tl.cast(i_tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        o_mixed, o_dmixed = o_row * stride_row, o_row * stride_d_row
        b_cos, b_sin = cos_sin(p_positions, p_frequencies, o_row, m_row, stride_position_row, HALF, BLOCK_HALF)
        for i_query in range(QUERIES):
            b_a, b_b, b_rest = backward_head(
                p_mixed + i_query * DIM, p_dq_out + i_query * stride_dqo_head, p_dmixed + i_query * DIM,
                b_cos, b_sin, b_q_a, b_q_b, b_q_rest, o_mixed, o_row * stride_dqo_row, o_dmixed, m_row, eps,
                HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED, NORM,
            )  # fmt: skip
            if NORM:
                b_dq_a += b_a
                b_dq_b += b_b
                if PASS > 0:
                    b_dq_rest += b_rest
        b_a, b_b, b_rest = backward_head(
            p_mixed + QUERIES * DIM, p_dk_out, p_dmixed + QUERIES * DIM, b_cos, b_sin, b_k_a, b_k_b, b_k_rest,
            o_mixed, o_row * stride_dko_row, o_dmixed, m_row, eps, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED,
            NORM,
        )  # fmt: skip
        copy_head(p_dv_out, p_dmixed + (QUERIES + 1) * DIM, o_row * stride_dvo_row, o_dmixed, m_row, DIM, BLOCK_DIM)
        if NORM:
            b_dk_a += b_a
            b_dk_b += b_b
            if PASS > 0:
                b_dk_rest += b_rest
    if NORM:
        o_one = tl.zeros((1,), tl.int64)
        p_dgain += (i_batch * tl.num_programs(0) + tl.program_id(0)) * 2 * (2 * HALF + PASS)
        store_head(
            p_dgain, tl.sum(b_dq_a, axis=0)[None, :], tl.sum(b_dq_b, axis=0)[None, :],
            tl.sum(b_dq_rest, axis=0)[None, :], o_one, o_one == 0, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED,
        )  # fmt: skip
        store_head(
            p_dgain + 2 * HALF + PASS, tl.sum(b_dk_a, axis=0)[None, :], tl.sum(b_dk_b, axis=0)[None, :],
            tl.sum(b_dk_rest, axis=0)[None, :], o_one, o_one == 0, HALF, PASS, BLOCK_HALF, BLOCK_PASS, INTERLEAVED,
        )  # fmt: skip
