"""Cross-entropy of rows of logits over a shard of the words, in plain PyTorch.

With x = scale * logits: loss = log(sum(exp(x))) - x[label], d logits = scale * d loss * (softmax(x) - onehot(label)).
A rank holds a shard of the words: what the ranks combine are three numbers of each row.
"""

import torch
from torch import Tensor


def statistics(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of this shard.

    Args:
        logits: [rows, words], bfloat16, float16, float32 or float64.
        labels: int64 [rows], a word of this shard, or any number outside it.

    Returns:
        peak, the largest x of each row; sum(exp(x - peak)); and x[label], 0 where the label is not in this shard:
        float32 (float64 for such logits) [rows] each.
    """
    x = _float(logits) * scale
    places, here = _places(labels, logits.shape[1])
    peak = x.amax(-1)
    return peak, (x - peak[:, None]).exp().sum(-1), x.gather(-1, places[:, None])[:, 0] * here


def gradients(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, d_loss: Tensor, scale: float) -> Tensor:
    """Gradients of the logits; may overwrite `logits`.

    Args:
        peak, total: [rows], of all shards together.
        d_loss: float32 [rows].

    Returns:
        [rows, words] in the dtype of `logits`.
    """
    places, here = _places(labels, logits.shape[1])
    x = (_float(logits) * scale).sub_(peak[:, None]).exp_().div_(total[:, None])
    x.scatter_add_(-1, places[:, None], -here.to(x.dtype)[:, None])
    return x.mul_((d_loss * scale)[:, None]).to(logits.dtype)


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _places(labels: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Index of each label, 0 where it is not in this shard, and whether it is."""
    here = (labels >= 0) & (labels < words)
    return labels.where(here, 0), here
