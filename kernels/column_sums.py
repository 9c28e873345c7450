"""A weight's gradient from its parts, one of which each program of a backward kernel has written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.launch import launch, repeatable
from megatron_ksa.kernels.unchecked import is_taken

OP = "column sums"
BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 128, 16, 4


@triton.jit
def column_sums_kernel(p_parts, p_out, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program sums BLOCK_C columns: p_parts float32 [rows, columns], p_out [columns] of any dtype."""
    o_column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_column = o_column < columns
    # [BLOCK_R, BLOCK_C]
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_row in range(0, rows, BLOCK_R):
        o_row = i_row + tl.arange(0, BLOCK_R)
        m = (o_row < rows)[:, None] & m_column[None, :]
        b_sum += tl.load(p_parts + o_row.to(tl.int64)[:, None] * columns + o_column[None, :], mask=m, other=0.0)
    tl.store(p_out + o_column, tl.sum(b_sum, axis=0).to(p_out.dtype.element_ty), mask=m_column)


@repeatable
def _launch(tensors: tuple[Tensor, ...], settings: None) -> None:
    """tensors: parts, out."""
    parts, out = tensors
    rows, columns = parts.shape
    launch(
        column_sums_kernel, (triton.cdiv(columns, BLOCK_COLUMNS),), parts, out, rows, columns, BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the first dimension in a fixed order, in one kernel where torch takes three.

    Args:
        parts: float32 [parts, ...].
        dtype: of the result; sums are float32.

    Returns:
        [...], one dimension fewer than `parts`.
    """
    if parts.is_cuda and not is_taken(OP):
        return parts.sum(0).to(dtype)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if out.numel():
        # Views of every other row flatten to a view, whose rows are no neighbours.
        _launch((parts.flatten(1).contiguous(), out.flatten()), None)
    return out
