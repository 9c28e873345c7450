"""Distillation losses of logits in Triton: each pass reads both logits once; gradients take the student's place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.kernels.distillation.reference import RowStatistics

BLOCK_WORDS = 4096
WARPS = 8


@triton.jit
def statistics_kernel(
    student, teacher, labels, peak, total, picked, teacher_peak, teacher_total, cross, words, student_stride,
    teacher_stride, scale, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_student, p_teacher = student + i_row * student_stride, teacher + i_row * teacher_stride
    o_words = tl.arange(0, BLOCK_W)
    # Running peaks and sums of each lane: one reduction over the lanes at the end.
    b_peak = tl.full([BLOCK_W], float("-inf"), tl.float32)
    b_teacher_peak = tl.full([BLOCK_W], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_W], tl.float32)
    b_teacher_sum = tl.zeros([BLOCK_W], tl.float32)
    b_cross = tl.zeros([BLOCK_W], tl.float32)
    for i_word in range(0, words, BLOCK_W):
        m_words = i_word + o_words < words
        b_x = tl.load(p_student + i_word + o_words, mask=m_words, other=float("-inf")).to(tl.float32) * scale
        b_t = tl.load(p_teacher + i_word + o_words, mask=m_words, other=float("-inf")).to(tl.float32) * scale
        b_new = tl.maximum(b_peak, b_x)
        # A lane that has seen no finite word keeps its sum of 0.
        b_old = tl.where(b_new == float("-inf"), 0.0, tl.exp(b_peak - b_new))
        b_sum = b_sum * b_old + tl.where(b_new == float("-inf"), 0.0, tl.exp(b_x - b_new))
        b_peak = b_new
        b_new = tl.maximum(b_teacher_peak, b_t)
        b_old = tl.where(b_new == float("-inf"), 0.0, tl.exp(b_teacher_peak - b_new))
        b_weight = tl.where(b_new == float("-inf"), 0.0, tl.exp(b_t - b_new))
        b_teacher_sum = b_teacher_sum * b_old + b_weight
        # A word that the teacher rules out counts nothing, whatever the student thinks of it.
        b_cross = b_cross * b_old + tl.where(b_weight > 0, b_weight * (b_t - b_x), 0.0)
        b_teacher_peak = b_new
    row_peak = tl.max(b_peak, axis=0)
    tl.store(peak + i_row, row_peak)
    tl.store(total + i_row, tl.sum(tl.where(b_sum > 0, b_sum * tl.exp(b_peak - row_peak), 0.0), axis=0))
    row_peak = tl.max(b_teacher_peak, axis=0)
    b_weight = tl.where(b_teacher_sum > 0, tl.exp(b_teacher_peak - row_peak), 0.0)
    tl.store(teacher_peak + i_row, row_peak)
    tl.store(teacher_total + i_row, tl.sum(b_teacher_sum * b_weight, axis=0))
    tl.store(cross + i_row, tl.sum(tl.where(b_weight > 0, b_cross * b_weight, 0.0), axis=0))
    label = tl.load(labels + i_row)
    here = (label >= 0) & (label < words)
    x = tl.load(p_student + tl.where(here, label, 0)).to(tl.float32) * scale
    tl.store(picked + i_row, tl.where(here, x, 0.0))


@triton.jit
def gradients_kernel(
    student, teacher, labels, peak, total, teacher_peak, teacher_total, words, student_stride, teacher_stride,
    ce_weight, kl_weight, scale, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_words = o_words < words
    p_student = student + i_row * student_stride + o_words
    b_x = tl.load(p_student, mask=m_words, other=float("-inf")).to(tl.float32) * scale
    p_teacher = teacher + i_row * teacher_stride + o_words
    b_t = tl.load(p_teacher, mask=m_words, other=float("-inf")).to(tl.float32) * scale
    b_q = tl.exp(b_x - tl.load(peak + i_row)) / tl.load(total + i_row)
    b_p = tl.exp(b_t - tl.load(teacher_peak + i_row)) / tl.load(teacher_total + i_row)
    b_d = (ce_weight + kl_weight) * b_q - kl_weight * b_p
    b_d -= tl.where(o_words == tl.load(labels + i_row), ce_weight, 0.0)
    tl.store(p_student, (b_d * scale).to(student.dtype.element_ty), mask=m_words)


def statistics(student: Tensor, teacher: Tensor, labels: Tensor, scale: float) -> RowStatistics:
    """Arguments and results as in `reference.statistics`; words are neighbours in memory."""
    rows, words = student.shape
    made = RowStatistics(*(torch.empty(rows, dtype=torch.float32, device=student.device) for _ in range(6)))
    if rows:
        statistics_kernel[(rows,)](
            student, teacher, labels.contiguous(), *made, words, student.stride(0), teacher.stride(0), scale,
            BLOCK_W=BLOCK_WORDS, num_warps=WARPS,
        )  # fmt: skip
    return made


def gradients(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: RowStatistics, ce_weight: float, kl_weight: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Arguments and result as in `reference.gradients`; overwrites `student`."""
    number, words = student.shape
    peaks = (part.contiguous() for part in (rows.peak, rows.total, rows.teacher_peak, rows.teacher_total))
    if number:
        gradients_kernel[(number, triton.cdiv(words, BLOCK_WORDS))](
            student, teacher, labels.contiguous(), *peaks, words, student.stride(0), teacher.stride(0), ce_weight,
            kl_weight, scale, BLOCK_W=BLOCK_WORDS, num_warps=WARPS,
        )  # fmt: skip
    return student
