"""Cross-entropy of a student and its KL divergence from a teacher, rows of logits over a shard of the words.

With x = scale * student logits, t = scale * teacher logits, p = softmax(t) and q = softmax(x):

    CE = log(sum(exp(x))) - x[label]
    KL = sum(p * (log p - log q)) = sum(p * (t - x)) - log(sum(exp(t))) + log(sum(exp(x)))
    d(w_ce * CE + w_kl * KL) / d student logits = scale * ((w_ce + w_kl) * q - w_ce * onehot(label) - w_kl * p)

A rank holds a shard of the words: what the ranks combine are six numbers of each row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowStatistics(NamedTuple):
    """What both losses need of each row, [rows] each, float32 (float64 for such logits).

    Attributes:
        peak, total: largest x, and sum(exp(x - peak)).
        picked: x[label], 0 where the label is not in this shard.
        teacher_peak, teacher_total: the same of t.
        cross: sum(exp(t - teacher_peak) * (t - x)).
    """

    peak: Tensor
    total: Tensor
    picked: Tensor
    teacher_peak: Tensor
    teacher_total: Tensor
    cross: Tensor

    def cross_entropy(self) -> Tensor:
        """CE of rows whose statistics are those of all shards."""
        return self.total.log() + self.peak - self.picked

    def divergence(self) -> Tensor:
        """KL of rows whose statistics are those of all shards."""
        student, teacher = self.total.log() + self.peak, self.teacher_total.log() + self.teacher_peak
        return self.cross / self.teacher_total + (student - teacher)


def statistics(student: Tensor, teacher: Tensor, labels: Tensor, scale: float) -> RowStatistics:
    """What the losses need of this shard.

    Args:
        student, teacher: [rows, words], bfloat16, float16, float32 or float64; a word may be -inf in both.
        labels: int64 [rows], a word of this shard, or any number outside it.
    """
    x, t = _float(student) * scale, _float(teacher) * scale
    places, here = _places(labels, student.shape[1])
    peak, teacher_peak = x.amax(-1), t.amax(-1)
    weight = (t - teacher_peak[:, None]).exp()
    # A word that the teacher rules out counts nothing, whatever the student thinks of it.
    cross = torch.where(weight > 0, weight * (t - x), 0.0).sum(-1)
    picked = torch.where(here, x.gather(-1, places[:, None])[:, 0], 0.0)
    return RowStatistics(peak, (x - peak[:, None]).exp().sum(-1), picked, teacher_peak, weight.sum(-1), cross)


def gradients(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: RowStatistics, ce_weight: float, kl_weight: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients of w_ce * CE + w_kl * KL for the student's logits; may overwrite `student`.

    Args:
        rows: of all shards together; `picked` and `cross` are not used.

    Returns:
        [rows, words] in the dtype of `student`.
    """
    places, here = _places(labels, student.shape[1])
    q = (_float(student) * scale - rows.peak[:, None]).exp() / rows.total[:, None]
    p = (_float(teacher) * scale - rows.teacher_peak[:, None]).exp() / rows.teacher_total[:, None]
    gradient = (ce_weight + kl_weight) * q - kl_weight * p
    gradient.scatter_add_(-1, places[:, None], -ce_weight * here.to(gradient.dtype)[:, None])
    return (gradient * scale).to(student.dtype)


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _places(labels: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Index of each label, 0 where it is not in this shard, and whether it is."""
    here = (labels >= 0) & (labels < words)
    return labels.where(here, 0), here
