"""The gradient of an embedding, added to the rows of its float32 buffer that belong to words that occur."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.dispatch import by_device

OP = "gradient of the embedding"
BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 8, 512, 4


@triton.jit
def add_rows_kernel(
    p_words, p_order, p_rows, p_total, rows, size, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add all rows of one word to the word's row of p_total; grid (rows, blocks of columns).

    The program of a word's first row does it, those of its other rows end at once.

    Args:
        p_words: int64 [rows], in ascending order.
        p_order: int64 [rows], where in p_rows each of these words' rows is.
        p_rows: [rows, size].
        p_total: float32 [vocabulary, size].
    """
    i_row = tl.program_id(0)
    word = tl.load(p_words + i_row)
    before = tl.load(p_words + i_row - 1, mask=i_row > 0, other=-1)
    if word != before:
        # [BLOCK_C]
        o_column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_column = o_column < size
        p_out = p_total + word * size + o_column
        b_sum = tl.load(p_out, mask=m_column, other=0.0)
        found = BLOCK_R
        while found == BLOCK_R:
            # [BLOCK_R]
            o_row = i_row + tl.arange(0, BLOCK_R)
            m_row = o_row < rows
            m_row = m_row & (tl.load(p_words + o_row, mask=m_row, other=-1) == word)
            o_place = tl.load(p_order + o_row, mask=m_row, other=0)
            m = m_row[:, None] & m_column[None, :]
            b_rows = tl.load(p_rows + o_place[:, None] * size + o_column[None, :], mask=m, other=0.0)
            b_sum += tl.sum(b_rows.to(tl.float32), axis=0)
            found = tl.sum(m_row.to(tl.int32), axis=0)
            i_row += BLOCK_R
        tl.store(p_out, b_sum, mask=m_column)


def _add_rows(words: Tensor, rows: Tensor, total: Tensor) -> None:
    """`_reference` in Triton. Deterministic: the rows of a word are added in the order in which they stand."""
    words, order = torch.sort(words, stable=True)
    rows = rows.contiguous()
    if rows.numel():
        add_rows_kernel[(rows.shape[0], triton.cdiv(rows.shape[1], BLOCK_COLUMNS))](
            words, order, rows, total, *rows.shape, BLOCK_R=BLOCK_ROWS, BLOCK_C=BLOCK_COLUMNS, num_warps=WARPS
        )


def _reference(words: Tensor, rows: Tensor, total: Tensor) -> None:
    """total[words[i]] += rows[i] for every i, with sums in float32.

    Args:
        words: int64 [n], below the vocabulary's size.
        rows: [n, size], gradients of the embedding's outputs.
        total: float32 [vocabulary, size], contiguous; changed in place.
    """
    total.index_add_(0, words, rows.to(total.dtype))


add_rows = by_device(OP, "megatron_ksa.kernels.embedding_gradient:_add_rows")(_reference)
