"""Forward passes for evaluation: hidden states of whole sequences, logits only where they are asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ksa.model.gpt import KSAGPTModel

# Rows of logits at a time: 128k rows of a 32k vocabulary would be 16 GiB in float32.
LOGIT_ROWS = 4096


def _device(model: KSAGPTModel) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def hidden_states(model: KSAGPTModel, tokens: Tensor) -> Tensor:
    """Final hidden states of the text rows.

    Args:
        tokens: int64 [batch, n].

    Returns:
        [batch, n, hidden], after the final norm.
    """
    tokens = tokens.to(_device(model))
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    post_process, model.post_process = model.post_process, False
    try:
        rows = model(tokens, positions)
    finally:
        model.post_process = post_process
    return model.layout.shrink(rows).transpose(0, 1)


@torch.no_grad()
def logits_of(model: KSAGPTModel, hidden: Tensor) -> Tensor:
    """Logits of hidden states: [rows, hidden] -> float32 [rows, vocabulary]."""
    shared = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(hidden[:, None], weight=shared)
    return logits[:, 0].float()


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
