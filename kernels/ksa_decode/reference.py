"""One decoding step's attention in plain PyTorch: what the Triton kernels are compared with, and the CPU path."""

import math

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_decode.geometry import CacheGeometry


def _softmax_values(scores: Tensor, values: Tensor) -> Tensor:
    """softmax(scores) @ values, [..., queries, keys] and [..., keys, D]."""
    return scores.softmax(dim=-1) @ values.to(scores.dtype)


def _attend_text(q: Tensor, key: Tensor, value: Tensor, position: int, geometry: CacheGeometry, scale: float) -> Tensor:
    """One sequence's text query [Hkv, heads per group, D] over its cache [Hkv, rows, D]."""
    rows, hidden = geometry.visible(position)
    key, value = key[:, :rows], value[:, :rows]
    if geometry.window is not None:
        # Rows of the ring that nothing was written to may lie among those that are seen.
        seen = (~hidden).nonzero().flatten().to(key.device)
        return _softmax_values(q @ key[:, seen].to(q.dtype).transpose(1, 2) * scale, value[:, seen])
    scores = q @ key.to(q.dtype).transpose(1, 2) * scale
    scores[..., hidden.to(scores.device)] = -math.inf
    return _softmax_values(scores, value)


def _attend_summaries(q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Summary queries over the text of their chunk and over each other, in order.

    Args:
        q: [Hkv, heads per group, S, D].
        keys, values: of text [Hkv, text rows, D] and of the summaries [S, Hkv, D].
    """
    key, value = (
        torch.cat([text, summaries.transpose(0, 1)], dim=1)[:, None].to(q.dtype) for text, summaries in (keys, values)
    )
    scores = q @ key.transpose(-1, -2) * scale
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores[..., -q.shape[2] :].masked_fill_(later, -math.inf)
    return _softmax_values(scores, value)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    starts: Tensor,
    geometry: CacheGeometry,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Keep the rows of a step in the cache, and attend from them.

    Row 0 of a sequence is its token at position starts[b]. Where there are more rows, they are the S summaries of that
    token's chunk. They read the chunk's text up to the token and each other; if the token completes the chunk they are
    kept, else they and their output mean nothing: the steps of all sequences have the same shape.

    Args:
        q: [1 or 1 + S, B, Hq, D]; query head h reads K/V head h // (Hq / Hkv). Rotated, as the keys.
        k, v: [1 or 1 + S, B, Hkv, D].
        key_cache, value_cache: [slots, Hkv, geometry.rows, D], written in place.
        slots: int [B], each sequence's place in the cache; all different.
        starts: int [B], tokens that each sequence had before this step.
        softmax_scale: 1 / sqrt(D) by default.

    Returns:
        [1 or 1 + S, B, Hq, D] in q's dtype; sums are float32, or float64 for float64.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    summary_tokens, chunk_size = q.shape[0] - 1, geometry.chunk_size
    grouped = q.to(torch.promote_types(q.dtype, torch.float32)).unflatten(2, (k.shape[2], -1))
    out = torch.empty_like(grouped)
    for b, (slot, position) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        key, value = key_cache[slot], value_cache[slot]
        row, chunk = position % geometry.ring, position // chunk_size
        key[:, row], value[:, row] = k[0, b], v[0, b]
        out[0, b] = _attend_text(grouped[0, b], key, value, position, geometry, scale)
        if not summary_tokens:
            continue
        if (position + 1) % chunk_size == 0 and (chunk + 1) * summary_tokens <= geometry.summaries:
            place = slice(geometry.ring + chunk * summary_tokens, geometry.ring + (chunk + 1) * summary_tokens)
            key[:, place], value[:, place] = (rows[1:, b].transpose(0, 1) for rows in (k, v))
        text = slice(row // chunk_size * chunk_size, row + 1)
        # [Hkv, heads per group, S, D]
        queries = grouped[1:, b].permute(1, 2, 0, 3)
        read = _attend_summaries(queries, (key[:, text], k[1:, b]), (value[:, text], v[1:, b]), scale)
        out[1:, b] = read.permute(2, 0, 1, 3)
    return out.flatten(2, 3).to(q.dtype)
