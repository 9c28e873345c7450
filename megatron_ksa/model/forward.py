"""Forward passes without labels: final hidden states, and logits of the rows that are asked for."""

import torch
from torch import Tensor

from megatron_ksa.model.gpt import KSAGPTModel


def device_of(model: KSAGPTModel) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


@torch.no_grad()
def hidden_states(model: KSAGPTModel, tokens: Tensor) -> Tensor:
    """Final hidden states of the text rows.

    Args:
        tokens: int64 [batch, n].

    Returns:
        [batch, n, hidden], after the final norm.
    """
    tokens = tokens.to(device_of(model))
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
