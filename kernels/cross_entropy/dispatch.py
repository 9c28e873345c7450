"""Cross-entropy by device (see `kernels/dispatch.py`): Triton kernels or the PyTorch reference."""

from torch import Tensor

from megatron_ksa.kernels.cross_entropy import reference
from megatron_ksa.kernels.dispatch import uses_triton

OP = "cross-entropy"


def statistics(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `reference.statistics`."""
    run = reference.statistics
    if uses_triton(OP, logits):
        from megatron_ksa.kernels.cross_entropy.triton_kernels import statistics as run
    return run(logits, labels, scale)


def gradients(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, d_loss: Tensor, scale: float) -> Tensor:
    """Arguments and result as in `reference.gradients`; may overwrite `logits`."""
    run = reference.gradients
    if uses_triton(OP, logits):
        from megatron_ksa.kernels.cross_entropy.triton_kernels import gradients as run
    return run(logits, labels, peak, total, d_loss, scale)
