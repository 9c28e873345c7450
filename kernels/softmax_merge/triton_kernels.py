"""`merge_into` of reference.py in Triton: every row is read and written once."""

import triton
import triton.language as tl
from torch import Tensor

# Rows of heads that a program works on (row r of head h counts as one), and its warps.
BLOCK_ROWS, WARPS = 16, 4


@triton.jit
def merge_kernel(
    p_a, p_lse_a, p_b, p_lse_b, rows, heads, dim,
    a_batch, a_row, a_head, lse_a_batch, lse_a_head, b_batch, b_row, b_head, lse_b_batch, lse_b_head,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """a = w a + (1 - w) b, w = sigmoid(lse_a - lse_b); lse_a = log(exp(lse_a) + exp(lse_b))."""
    i_b = tl.program_id(1).to(tl.int64)
    # A row of every head, then the next row, as they stand in memory; 32 bits count them, and divide faster than 64.
    o_pair = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row, o_head = (o_pair // heads).to(tl.int64), (o_pair % heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < rows
    m_rows = m_row[:, None] & (o_d < dim)[None, :]
    p_a += i_b * a_batch + (o_row * a_row + o_head * a_head)[:, None] + o_d[None, :]
    p_b += i_b * b_batch + (o_row * b_row + o_head * b_head)[:, None] + o_d[None, :]
    p_lse_a += i_b * lse_a_batch + o_head * lse_a_head + o_row
    # [BLOCK_R]
    b_lse_a = tl.load(p_lse_a, mask=m_row, other=0.0)
    b_lse_b = tl.load(p_lse_b + i_b * lse_b_batch + o_head * lse_b_head + o_row, mask=m_row, other=0.0)
    b_w = tl.sigmoid(b_lse_a - b_lse_b)
    b_max = tl.maximum(b_lse_a, b_lse_b)
    tl.store(p_lse_a, b_max + tl.log(tl.exp(b_lse_a - b_max) + tl.exp(b_lse_b - b_max)), mask=m_row)
    # [BLOCK_R, BLOCK_D]
    b_a = tl.load(p_a, mask=m_rows, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=m_rows, other=0.0).to(tl.float32)
    b_w = b_w[:, None]
    tl.store(p_a, (b_w * b_a + (1.0 - b_w) * b_b).to(p_a.dtype.element_ty), mask=m_rows)


def merge_into(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> None:
    """As `reference.merge_into`, for bfloat16, float16 and float32 with float32 log-sum-exps.

    The last dimension of every tensor is contiguous.
    """
    batch, rows, heads, dim = a.shape
    if not a.numel():
        return
    merge_kernel[triton.cdiv(rows * heads, BLOCK_ROWS), batch](
        a, lse_a, b, lse_b, rows, heads, dim,
        *a.stride()[:3], *lse_a.stride()[:2], *b.stride()[:3], *lse_b.stride()[:2],
        BLOCK_R=BLOCK_ROWS, BLOCK_D=triton.next_power_of_2(dim), num_warps=WARPS,
    )  # fmt: skip
