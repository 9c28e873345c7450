"""Cross-entropy of rows of logits in Triton: each pass reads the logits once, and the gradients take their place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_WORDS = 4096
WARPS = 8


@triton.jit
def statistics_kernel(
    logits, labels, peak, total, picked, words, stride, scale, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = logits + i_row * stride
    label = tl.load(labels + i_row)
    o_words = tl.arange(0, BLOCK_W)
    # Running peak and sum of each lane: one reduction over the lanes at the end.
    b_peak = tl.full([BLOCK_W], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_W], tl.float32)
    for i_word in range(0, words, BLOCK_W):
        b_x = tl.load(p_row + i_word + o_words, mask=i_word + o_words < words, other=float("-inf")).to(tl.float32)
        b_x *= scale
        b_new = tl.maximum(b_peak, b_x)
        # A lane that has seen no finite word keeps its sum of 0.
        b_old = tl.where(b_new == float("-inf"), 0.0, tl.exp(b_peak - b_new))
        b_sum = b_sum * b_old + tl.where(b_new == float("-inf"), 0.0, tl.exp(b_x - b_new))
        b_peak = b_new
    row_peak = tl.max(b_peak, axis=0)
    tl.store(peak + i_row, row_peak)
    tl.store(total + i_row, tl.sum(tl.where(b_sum > 0, b_sum * tl.exp(b_peak - row_peak), 0.0), axis=0))
    here = (label >= 0) & (label < words)
    x = tl.load(p_row + tl.where(here, label, 0)).to(tl.float32) * scale
    tl.store(picked + i_row, tl.where(here, x, 0.0))


@triton.jit
def gradients_kernel(
    logits, labels, peak, total, d_loss, words, stride, scale, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_words = o_words < words
    p_words = logits + i_row * stride + o_words
    b_x = tl.load(p_words, mask=m_words, other=float("-inf")).to(tl.float32) * scale
    b_p = tl.exp(b_x - tl.load(peak + i_row)) / tl.load(total + i_row)
    b_p -= tl.where(o_words == tl.load(labels + i_row), 1.0, 0.0)
    tl.store(p_words, (b_p * (tl.load(d_loss + i_row) * scale)).to(logits.dtype.element_ty), mask=m_words)


def statistics(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `reference.statistics`; words are neighbours in memory."""
    rows, words = logits.shape
    peak, total, picked = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        statistics_kernel[(rows,)](
            logits, labels.contiguous(), peak, total, picked, words, logits.stride(0), scale, BLOCK_W=BLOCK_WORDS,
            num_warps=WARPS,
        )  # fmt: skip
    return peak, total, picked


def gradients(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, d_loss: Tensor, scale: float) -> Tensor:
    """Arguments and result as in `reference.gradients`; overwrites `logits`."""
    rows, words = logits.shape
    if rows:
        gradients_kernel[(rows, triton.cdiv(words, BLOCK_WORDS))](
            logits, labels.contiguous(), peak.contiguous(), total.contiguous(), d_loss.contiguous(), words,
            logits.stride(0), scale, BLOCK_W=BLOCK_WORDS, num_warps=WARPS,
        )  # fmt: skip
    return logits
