"""Forward passes for evaluation: hidden states of whole sequences, logits only where they are asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ksa.model.forward import logits_of
from megatron_ksa.model.gpt import KSAGPTModel

# Rows of logits at a time: 128k rows of a 32k vocabulary would be 16 GiB in float32.
LOGIT_ROWS = 4096


def token_losses(model: KSAGPTModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label.

    Args:
        hidden: [rows, hidden].
        labels: int64 [rows].

    Returns:
        float32 [rows], nats.
    """
    parts = zip(hidden.split(LOGIT_ROWS), labels.to(hidden.device).split(LOGIT_ROWS), strict=True)
    return torch.cat([F.cross_entropy(logits_of(model, rows), part, reduction="none") for rows, part in parts])


def predictions(model: KSAGPTModel, hidden: Tensor) -> Tensor:
    """Most likely next token after each row: [rows, hidden] -> int64 [rows]."""
    return torch.cat([logits_of(model, rows).argmax(-1) for rows in hidden.split(LOGIT_ROWS)])
