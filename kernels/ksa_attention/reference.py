"""KSA attention in plain PyTorch: the definition the Triton kernels are compared with, and the CPU path.

Rows of a shard are laid out `[text | summaries]`. Work goes over blocks of queries, and the backward pass recomputes
each block's probabilities, so memory is linear in the number of rows: no n x n score matrix or mask exists.
Tensors are `[batch, rows, heads, head_dim]` with any strides; query head h reads K/V head h // (Hq / Hkv).

Visibility (KSA report, arXiv 2604.24432; C = chunk_size, S = summary_tokens, W = window_chunks):

    text i sees text j              iff j <= i,  i // C - j // C <= W,  j >= document_start[i]
    text i sees summary (c, s)      iff i // C - c > W,  c * C + C - 1 >= document_start[i]
    summary (c, s) sees text j      iff j // C == c,  j >= document_start[c * C + C - 1]
    summary (c, s) sees (c, s')     iff s' <= s
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
    TextOutputs,
)

QUERY_BLOCK = 128


class _Offsets(NamedTuple):
    """Global text position of the first query and of the first text key, and the chunk of the first summary."""

    query: int
    key: int
    chunk: int


class _Tile(NamedTuple):
    """Keys that some query of a block may see: slices into the text keys and the summaries, and who sees which."""

    text: slice
    summaries: slice
    visible: Tensor  # bool [batch or 1, block, text keys + summary keys]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tile(
    rows: slice, geometry: KSAGeometry, offsets: _Offsets, num_keys: int, num_summaries: int,
    document_start: Tensor | None, device: torch.device,
) -> _Tile:  # fmt: skip
    """Key ranges and visibility of the query block `rows` (local row numbers)."""
    chunk_size, summary_tokens, window = geometry.chunk_size, geometry.summary_tokens, geometry.window_chunks
    first, last = offsets.query + rows.start, offsets.query + rows.stop - 1
    oldest_text = max(0, (first // chunk_size - window) * chunk_size)
    text = slice(min(max(oldest_text - offsets.key, 0), num_keys), min(max(last + 1 - offsets.key, 0), num_keys))
    newest_summary = (last // chunk_size - window - offsets.chunk) * summary_tokens
    summaries = slice(0, min(max(newest_summary, 0), num_summaries))

    i = torch.arange(first, last + 1, device=device)[:, None]
    j = torch.arange(text.start, max(text.stop, text.start), device=device) + offsets.key
    c = torch.arange(summaries.stop, device=device) // summary_tokens + offsets.chunk
    sees_text = (j <= i) & (i // chunk_size - j // chunk_size <= window)
    sees_summary = i // chunk_size - c > window
    visible = torch.cat([sees_text, sees_summary], dim=-1)[None]
    if document_start is not None:
        start = document_start[:, first : last + 1, None]  # [batch, block, 1]
        chunk_end = c * chunk_size + chunk_size - 1
        visible = visible & torch.cat([j >= start, chunk_end >= start], dim=-1)
    return _Tile(slice(text.start, max(text.stop, text.start)), summaries, visible)


def _gather(tile: _Tile, text: Tensor, summaries: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys (or values) of a tile: [batch, K/V heads, 1, keys, head_dim]."""
    rows = torch.cat([text[:, tile.text], summaries[:, tile.summaries]], dim=1)
    return rows.to(dtype).transpose(1, 2)[:, :, None]


def _group(rows: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """[batch, block, query heads, head_dim] -> [batch, K/V heads, heads per group, block, head_dim]."""
    batch, block, heads, dim = rows.shape
    return rows.to(dtype).reshape(batch, block, num_groups, heads // num_groups, dim).permute(0, 2, 3, 1, 4)


def _ungroup(rows: Tensor) -> Tensor:
    """The inverse of `_group`."""
    return rows.permute(0, 3, 1, 2, 4).flatten(2, 3)


class _TextAttention(torch.autograd.Function):
    """Blockwise attention of text queries over windowed text keys and older summaries, with log-sum-exp output."""

    @staticmethod
    def forward(ctx, q, k, v, k_summary, v_summary, document_start, *settings):
        rows = Rows(q, k, v, k_summary, v_summary, document_start)
        outputs = _text_forward(rows, *settings)
        ctx.save_for_backward(*rows, *outputs)
        ctx.settings = settings
        return tuple(outputs)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *rows, out, lse = ctx.saved_tensors
        gradients = _text_backward(Rows(*rows), *ctx.settings, TextOutputs(out, lse), d_out, d_lse)
        return *gradients, *[None] * (1 + len(ctx.settings))


def _text_forward(rows: Rows, geometry: KSAGeometry, offsets: _Offsets, softmax_scale: float) -> TextOutputs:
    """Output and log-sum-exp of the text queries; shapes and dtypes as of `text_attention`."""
    q, k, v, k_summary, v_summary, document_start = rows
    batch, num_rows, heads, _ = q.shape
    dtype, groups = _accumulation_dtype(q.dtype), k.shape[2]
    out = q.new_empty(batch, num_rows, heads, v.shape[-1])
    lse = torch.empty(batch, heads, num_rows, dtype=dtype, device=q.device)
    for start in range(0, num_rows, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, num_rows))
        tile = _tile(block, geometry, offsets, k.shape[1], k_summary.shape[1], document_start, q.device)
        keys, values = _gather(tile, k, k_summary, dtype), _gather(tile, v, v_summary, dtype)
        # scores: [batch, K/V heads, heads per group, block, keys]
        scores = _group(q[:, block], groups, dtype) @ keys.transpose(-1, -2) * softmax_scale
        scores.masked_fill_(~tile.visible[:, None, None], -math.inf)
        block_lse = scores.logsumexp(dim=-1)
        probabilities = _probabilities(scores, block_lse)
        out[:, block] = _ungroup(probabilities @ values).to(out.dtype)
        lse[:, :, block] = block_lse.flatten(1, 2)
    return TextOutputs(out, lse)


def _text_backward(
    rows: Rows, geometry: KSAGeometry, offsets: _Offsets, softmax_scale: float, outputs: TextOutputs, d_out: Tensor,
    d_lse: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of the tensors of `rows`; d_lse None is 0."""
    q, k, v, k_summary, v_summary, document_start = rows
    out, lse = outputs
    dtype, groups = lse.dtype, k.shape[2]
    dq = torch.empty_like(q)
    dk, dv, dk_summary, dv_summary = (
        torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v, k_summary, v_summary)
    )
    for start in range(0, q.shape[1], QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, q.shape[1]))
        tile = _tile(block, geometry, offsets, k.shape[1], k_summary.shape[1], document_start, q.device)
        keys, values = _gather(tile, k, k_summary, dtype), _gather(tile, v, v_summary, dtype)
        queries, d_rows = _group(q[:, block], groups, dtype), _group(d_out[:, block], groups, dtype)
        scores = queries @ keys.transpose(-1, -2) * softmax_scale
        scores.masked_fill_(~tile.visible[:, None, None], -math.inf)
        probabilities = _probabilities(scores, lse[:, :, block].unflatten(1, (groups, -1)))
        # dS = P * (dP - rowsum(dO * O) + dLSE)
        delta = (d_rows * _group(out[:, block], groups, dtype)).sum(-1)
        if d_lse is not None:
            delta -= d_lse[:, :, block].unflatten(1, (groups, -1))
        d_scores = probabilities * (d_rows @ values.transpose(-1, -2) - delta[..., None]) * softmax_scale
        dq[:, block] = _ungroup(d_scores @ keys).to(dq.dtype)
        # [batch, K/V heads, heads per group, keys, head_dim] -> [batch, keys, K/V heads, head_dim]
        d_keys = (d_scores.transpose(-1, -2) @ queries).sum(2).transpose(1, 2)
        d_values = (probabilities.transpose(-1, -2) @ d_rows).sum(2).transpose(1, 2)
        text_keys = tile.text.stop - tile.text.start
        dk[:, tile.text] += d_keys[:, :text_keys]
        dv[:, tile.text] += d_values[:, :text_keys]
        dk_summary[:, tile.summaries] += d_keys[:, text_keys:]
        dv_summary[:, tile.summaries] += d_values[:, text_keys:]
    return Gradients(dq, dk.to(k.dtype), dv.to(v.dtype), dk_summary.to(k.dtype), dv_summary.to(v.dtype))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """softmax from scores and their log-sum-exp; rows that see nothing (lse = -inf) are 0."""
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    geometry: KSAGeometry,
    *,
    document_start: Tensor | None = None,
    query_start: int = 0,
    key_start: int = 0,
    chunk_start: int = 0,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of text queries over the text in their window and the summaries of older chunks.

    Args:
        q: [B, nq, Hq, D]: text queries at global positions query_start to query_start + nq - 1.
        k, v: [B, nk, Hkv, D]: text keys and values from global position key_start on.
        k_summary, v_summary: [B, nc * S, Hkv, D]: summaries of the chunks from chunk_start on. Without rows of these,
            queries see the text in their window alone.
        document_start: int [B, text rows of the whole sequence]: global position of the first token of each token's
            document, indexed by global position; None for one document.
        softmax_scale: 1 / sqrt(D) by default.

    Returns:
        out [B, nq, Hq, D] in q's dtype and the log-sum-exp of the scaled scores, float32 (float64 for float64 input)
        [B, Hq, nq], natural log. A query that sees nothing gets 0 and -inf. Both are differentiable.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    offsets = _Offsets(query_start, key_start, chunk_start)
    return _TextAttention.apply(q, k, v, k_summary, v_summary, document_start, geometry, offsets, scale)


def summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    geometry: KSAGeometry,
    *,
    document_start: Tensor | None = None,
    key_start: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of summary queries over the C text tokens of their chunk and its summaries up to themselves.

    Args:
        q: [B, nc * S, Hq, D]: summary queries of nc consecutive chunks.
        k, v: [B, nc * C, Hkv, D]: the text of those chunks, the first at global position key_start.
        k_summary, v_summary: [B, nc * S, Hkv, D].
        document_start, softmax_scale: as in `text_attention`.

    Returns:
        [B, nc * S, Hq, D] in q's dtype.
    """
    chunk_size, summary_tokens = geometry.chunk_size, geometry.summary_tokens
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    chunks, groups, dtype = q.shape[1] // summary_tokens, k.shape[2], _accumulation_dtype(q.dtype)

    def by_chunk(text: Tensor, summaries: Tensor) -> Tensor:
        """[B, nc, Hkv, 1, C + S, D]"""
        rows = [text.unflatten(1, (chunks, chunk_size)), summaries.unflatten(1, (chunks, summary_tokens))]
        return torch.cat(rows, dim=2).to(dtype).transpose(2, 3)[:, :, :, None]

    # queries: [B, nc, Hkv, heads per group, S, D]
    queries = q.to(dtype).unflatten(1, (chunks, summary_tokens)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    scores = queries @ by_chunk(k, k_summary).transpose(-1, -2) * scale
    order = torch.arange(summary_tokens, device=q.device)
    sees_summary = order[None, :] <= order[:, None]  # [S, S]
    text = torch.arange(key_start, key_start + chunks * chunk_size, device=q.device).view(1, chunks, chunk_size)
    if document_start is None:
        sees_text = torch.ones_like(text, dtype=torch.bool)
    else:
        sees_text = text >= document_start[:, text[0, :, -1]][:, :, None]
    batch = sees_text.shape[0]
    visible = torch.cat(
        [
            sees_text[:, :, None].expand(batch, chunks, summary_tokens, chunk_size),
            sees_summary.expand(batch, chunks, summary_tokens, summary_tokens),
        ],
        dim=-1,
    )
    probabilities = scores.masked_fill(~visible[:, :, None, None], -math.inf).softmax(dim=-1)
    out = probabilities @ by_chunk(v, v_summary)
    return out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: KSAGeometry,
    *,
    text_rows: int,
    document_start: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """KSA among all rows of a sequence, laid out `[text | summaries]`: the two attentions above, joined.

    Args:
        q: [B, text_rows + summary rows, Hq, D]; the text_rows // C whole chunks have S summaries each, a ragged last
            chunk has none. Without summary rows, queries see the text in their window alone.
        k, v: [B, text_rows + summary rows, Hkv, D].
        document_start: int32 [B, text_rows] position of the first token of each token's document, or None.
        softmax_scale: 1 / sqrt(D) by default.

    Returns:
        [B, text_rows + summary rows, Hq, D] in q's dtype.
    """
    options = {"document_start": document_start, "softmax_scale": softmax_scale}
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary) = (
        rows.split([text_rows, rows.shape[1] - text_rows], dim=1) for rows in (q, k, v)
    )
    text, _ = text_attention(q_text, k_text, v_text, k_summary, v_summary, geometry, **options)
    if not q_summary.shape[1]:
        return text
    whole = text_rows // geometry.chunk_size * geometry.chunk_size
    summaries = summary_attention(
        q_summary, k_text[:, :whole], v_text[:, :whole], k_summary, v_summary, geometry, **options
    )
    return torch.cat([text, summaries], dim=1)


def _of_sizes(sizes: Sizes) -> tuple[KSAGeometry, _Offsets, float]:
    geometry = KSAGeometry(sizes.chunk_size, sizes.summary_tokens, sizes.window)
    return geometry, _Offsets(sizes.query_start, sizes.key_start, sizes.chunk_start), sizes.softmax_scale


def _of_chunks(rows: Rows, queries: Tensor, sizes: Sizes) -> tuple[list[Tensor], dict]:
    """Arguments of `summary_attention` for the summary queries of the chunks in `rows`."""
    whole = rows.k.shape[1] // sizes.chunk_size * sizes.chunk_size
    keys = [rows.k[:, :whole], rows.v[:, :whole], rows.k_summary, rows.v_summary]
    options = {"document_start": rows.document_start, "key_start": sizes.key_start}
    return [queries, *keys], options | {"softmax_scale": sizes.softmax_scale}


def forward(rows: Rows, summary: SummaryForward, outputs: TextOutputs, sizes: Sizes) -> None:
    """The forward pass of text queries, and of the summary queries of the same chunks, into memory of the caller's.

    Nothing is recorded for a backward pass. The tensors of the text queries and of the summary queries should be views
    of one tensor each: with other strides the kernels serve the two apart.

    Args:
        rows: the text queries, the keys and values of both kinds, and where documents begin, as in `text_attention`.
        summary: the summary queries, all those of the chunks in `rows` or none, and memory for their output.
        outputs: memory for the output of the text queries and for its log-sum-exp, contiguous.
        sizes: geometry, of which summary_tokens is at least 1, and offsets as in `text_attention`.
    """
    out, lse = _text_forward(rows, *_of_sizes(sizes))
    outputs.out.copy_(out)
    outputs.lse.copy_(lse)
    if summary.q.shape[1]:
        tensors, options = _of_chunks(rows, summary.q, sizes)
        summary.out.copy_(summary_attention(*tensors, _of_sizes(sizes)[0], **options))


def backward(
    rows: Rows, summary: SummaryBackward, outputs: TextOutputs, d_out: Tensor, gradients: Gradients, sizes: Sizes
) -> None:
    """The backward pass of `forward` into memory of the caller's: fills `gradients` and dQ of the summary queries.

    Args:
        outputs: output and log-sum-exp of the text queries. If they saw further keys in other calls, both are those of
            all keys together, and the gradients are this call's part: with P = exp(scores - lse),
            dS = P * (dP - rowsum(dO * O)).
        d_out: gradient of the text queries' output.
    """
    for target, gradient in zip(gradients, _text_backward(rows, *_of_sizes(sizes), outputs, d_out, None), strict=True):
        target.copy_(gradient)
    if not summary.q.shape[1]:
        return
    tensors, options = _of_chunks(rows, summary.q, sizes)
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        out = summary_attention(*tensors, _of_sizes(sizes)[0], **options)
    dq, *d_keys = torch.autograd.grad(out, tensors, summary.d_out)
    summary.dq.copy_(dq)
    for target, gradient in zip(gradients[1:], d_keys, strict=True):
        target[:, : gradient.shape[1]] += gradient
