"""How much attention the text of each chunk gives to every older chunk's summaries, by layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.config.ksa import KSALayer
from megatron_ksa.model.core_attention import KSACoreAttention
from megatron_ksa.model.gpt import KSAGPTModel


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, mean over the text queries of each chunk.

    Attributes:
        layer: number, counted from 1.
        kind: of the layer, as in --ksa-layer-pattern.
        window: W, past chunks that it sees as text.
        summaries: float32 [heads, chunks (queries), chunks (summaries)]: attention to the summaries of a chunk; None in
            layers whose text sees no summaries.
    """

    layer: int
    kind: str
    window: int
    summaries: Tensor | None


def _chunk_attention(query: Tensor, key: Tensor, core: KSACoreAttention) -> Tensor:
    """Explicit softmax over what text queries see, a chunk of queries at a time.

    Args:
        query: [rows, heads, head_dim] with text rows first; key with K/V heads.

    Returns:
        float32 [heads, chunks, chunks].
    """
    size, per_chunk, window = core.geometry.chunk_size, core.geometry.summary_tokens, core.geometry.window_chunks
    text = core.layout.text_rows(len(query))
    chunks, heads = text // size, query.shape[1]
    scale = core.softmax_scale or query.shape[2] ** -0.5
    keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    place = torch.arange(text, device=query.device)
    chunk_of_key = torch.cat([place // size, torch.arange(len(key) - text, device=query.device) // per_chunk])
    found = torch.zeros(heads, chunks, chunks)
    for chunk in range(chunks):
        rows = slice(chunk * size, (chunk + 1) * size)
        age = chunk - chunk_of_key
        near = (age[:text] <= window)[None] & (place <= place[rows, None])
        seen = torch.cat([near, (age[text:] > window).expand(size, -1)], dim=1)
        scores = torch.einsum("ihd,jhd->hij", query[rows].float(), keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)[..., text:].mean(1)
        older = weights[:, : chunks * per_chunk].unflatten(1, (chunks, per_chunk)).sum(-1)
        found[:, chunk] = older.cpu()
    return found


def summary_attention(model: KSAGPTModel, layers: Sequence[KSALayer], tokens: Tensor) -> list[LayerAttention]:
    """Attention on summaries of a whole text, layer by layer.

    Args:
        model: a whole model in one process.
        layers: kind and window of its layers.
        tokens: int64 [n], n a multiple of the chunk size.
    """
    found: dict[int, Tensor] = {}

    def look(core: KSACoreAttention, args: tuple, out: Tensor) -> None:
        found[core.number] = _chunk_attention(args[0][:, 0], args[1][:, 0], core)

    handles = []
    for number, layer in enumerate(model.decoder.layers, start=1):
        core = layer.self_attention.core_attention
        if isinstance(core, KSACoreAttention) and not core.sees_all_text:
            core.number = number
            handles.append(core.register_forward_hook(look))
    try:
        with torch.no_grad():
            model(tokens[None], torch.arange(len(tokens), device=tokens.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerAttention(number, str(layer.kind), layer.window_chunks, found.get(number))
        for number, layer in enumerate(layers, start=1)
    ]
