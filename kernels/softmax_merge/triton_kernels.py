"""`merge` of reference.py in Triton: the forward and the backward pass each read and write every row once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.differentiable import differentiable

# Rows of heads that a program works on (row r of head h counts as one), and its warps.
BLOCK_ROWS, WARPS = 16, 4


@triton.jit
def _places(rows, heads, dim, batch_stride, row_stride, head_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of this program's rows [BLOCK_R, BLOCK_D], and of the rows' log-sum-exps [BLOCK_R]."""
    i_batch = tl.program_id(1).to(tl.int64)
    # A row of every head, then the next row, as they stand in memory; 32 bits count them, and divide faster than 64.
    o_pair = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row, o_head = (o_pair // heads).to(tl.int64), (o_pair % heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < rows
    o_rows = i_batch * batch_stride + (o_row * row_stride + o_head * head_stride)[:, None] + o_d[None, :]
    o_lse = (i_batch * heads + o_head) * rows + o_row
    return o_rows, m_row[:, None] & (o_d < dim)[None, :], o_lse, m_row


@triton.jit
def forward_kernel(
    a, lse_a, b, lse_b, out, rows, heads, dim, batch_stride, row_stride, head_stride, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = w a + (1 - w) b, w = sigmoid(lse_a - lse_b); a, b and out have the same strides."""
    o_rows, m_rows, o_lse, m_lse = _places(
        rows, heads, dim, batch_stride, row_stride, head_stride, BLOCK_R, BLOCK_D
    )  # fmt: skip
    # [BLOCK_R, 1]
    b_w = tl.sigmoid(tl.load(lse_a + o_lse, mask=m_lse, other=0.0) - tl.load(lse_b + o_lse, mask=m_lse, other=0.0))
    b_w = b_w[:, None]
    # [BLOCK_R, BLOCK_D]
    b_a = tl.load(a + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    tl.store(out + o_rows, (b_w * b_a + (1.0 - b_w) * b_b).to(out.dtype.element_ty), mask=m_rows)


@triton.jit
def backward_kernel(
    a, lse_a, b, lse_b, d_out, d_a, d_b, d_lse_a, d_lse_b, rows, heads, dim, batch_stride, row_stride, head_stride,
    d_batch_stride, d_row_stride, d_head_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a, b and both log-sum-exps from d_out, whose strides are its own."""
    o_rows, m_rows, o_lse, m_lse = _places(
        rows, heads, dim, batch_stride, row_stride, head_stride, BLOCK_R, BLOCK_D
    )  # fmt: skip
    o_out, _, _, _ = _places(rows, heads, dim, d_batch_stride, d_row_stride, d_head_stride, BLOCK_R, BLOCK_D)
    b_w = tl.sigmoid(tl.load(lse_a + o_lse, mask=m_lse, other=0.0) - tl.load(lse_b + o_lse, mask=m_lse, other=0.0))
    b_a = tl.load(a + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_d = tl.load(d_out + o_out, mask=m_rows, other=0.0).to(tl.float32)
    # [BLOCK_R]
    b_lse = tl.sum(b_d * (b_a - b_b), axis=1) * b_w * (1.0 - b_w)
    tl.store(d_lse_a + o_lse, b_lse, mask=m_lse)
    tl.store(d_lse_b + o_lse, -b_lse, mask=m_lse)
    tl.store(d_a + o_rows, (b_d * b_w[:, None]).to(d_a.dtype.element_ty), mask=m_rows)
    tl.store(d_b + o_rows, (b_d * (1.0 - b_w)[:, None]).to(d_b.dtype.element_ty), mask=m_rows)


def _sizes(a: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants."""
    batch, rows, heads, dim = a.shape
    constants = {"BLOCK_R": BLOCK_ROWS, "BLOCK_D": triton.next_power_of_2(dim), "num_warps": WARPS}
    return (triton.cdiv(rows * heads, BLOCK_ROWS), batch), constants


def _forward(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    a, lse_a, b, lse_b = (each.contiguous() for each in (a, lse_a, b, lse_b))
    out = torch.empty_like(a)
    if out.numel():
        grid, constants = _sizes(a)
        forward_kernel[grid](a, lse_a, b, lse_b, out, *a.shape[1:], *a.stride()[:3], **constants)
    return out


def _backward(
    a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, lse_a, b, lse_b = (each.contiguous() for each in (a, lse_a, b, lse_b))
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    gradients = tuple(torch.empty_like(each) for each in (a, b, lse_a, lse_b))
    if a.numel():
        grid, constants = _sizes(a)
        backward_kernel[grid](
            a, lse_a, b, lse_b, d_out, *gradients, *a.shape[1:], *a.stride()[:3], *d_out.stride()[:3], **constants
        )
    d_a, d_b, d_lse_a, d_lse_b = gradients
    return d_a, d_lse_a, d_b, d_lse_b


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


merge_op = differentiable(
    "softmax_merge", _forward, _backward, save=_save,
    gradients=lambda ctx, backward, d_out: backward(*ctx.saved_tensors, d_out),
    fake=lambda a, *rest: torch.empty_like(a, memory_format=torch.contiguous_format),
    fake_backward=lambda a, lse_a, b, lse_b, d_out: tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (a, lse_a, b, lse_b)
    ),
)  # fmt: skip


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """Arguments and result as in `reference.merge`, for bfloat16, float16 and float32 with float32 log-sum-exps."""
    return merge_op(a, lse_a, b, lse_b)
