"""Distillation losses by device (see `kernels/dispatch.py`): Triton kernels or the PyTorch reference."""

from torch import Tensor

from megatron_ksa.kernels.dispatch import uses_triton
from megatron_ksa.kernels.distillation import reference
from megatron_ksa.kernels.distillation.reference import RowStatistics

OP = "distillation"


def statistics(student: Tensor, teacher: Tensor, labels: Tensor, scale: float) -> RowStatistics:
    """Arguments and results as in `reference.statistics`."""
    run = reference.statistics
    if uses_triton(OP, student):
        from megatron_ksa.kernels.distillation.triton_kernels import statistics as run
    return run(student, teacher, labels, scale)


def gradients(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: RowStatistics, ce_weight: float, kl_weight: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Arguments and result as in `reference.gradients`; may overwrite `student`."""
    run = reference.gradients
    if uses_triton(OP, student):
        from megatron_ksa.kernels.distillation.triton_kernels import gradients as run
    return run(student, teacher, labels, rows, ce_weight, kl_weight, scale)
