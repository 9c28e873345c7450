"""Attention of one layer of a decoder with Kwai Summary Attention: projections, rotation, and what each row reads."""

import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention
except ImportError:
    KSAGeometry = ksa_attention = None

# Text queries that attend at a time in plain PyTorch: bounds the mask of a long prompt.
QUERY_BLOCK = 1024


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _inverse_frequencies(config, device):
    """theta[g, i] = b_g^(-2 i / d_rot), float32 [KV groups or 1, d_rot / 2]."""
    dim = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    bases = config.rotary_bases or [config.rotary_base]
    frequencies = torch.stack([1.0 / (base**exponents) for base in bases])
    if config.rotary_llama3_factor is None or config.rotary_bases is not None:
        return frequencies
    # Llama 3: long wavelengths are stretched, short ones kept, those between blended.
    factor, low, high, original = config.rotary_llama3_factor, 1.0, 4.0, 8192
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def rotation_at(config, positions, dtype):
    """Cosines and sines for positions [batch, rows]: [batch, rows, KV groups or 1, 1, d_rot] of `dtype` each."""
    positions = positions.to(torch.float32)
    if config.rotary_interpolation is not None:
        positions = positions * (1 / config.rotary_interpolation)
    angles = positions[:, :, None, None, None] * _inverse_frequencies(config, positions.device)[:, None]
    if config.rotary_interleaved:
        angles = torch.stack([angles] * 2, dim=-1).flatten(-2)
    else:
        angles = torch.cat([angles] * 2, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(heads, rotation, interleaved):
    """Rotate the leading channels of heads [batch, rows, heads, head_dim]; a query head has its KV group's angles."""
    cos, sin = (part.to(heads.dtype) for part in rotation)
    grouped = heads.unflatten(2, (cos.shape[2], -1))
    turned, kept = grouped[..., : cos.shape[-1]], grouped[..., cos.shape[-1] :]
    if interleaved:
        half = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        half = torch.cat([-high, low], dim=-1)
    return torch.cat([turned * cos + half * sin, kept], dim=-1).flatten(2, 3)


def _attend(query, key, value, visible):
    """Softmax attention in which the query heads of a K/V head are rows of one product: K and V are not repeated.

    Args:
        query: [batch, q, heads, head_dim].
        key, value: [batch, K/V heads, k, head_dim].
        visible: bool [batch or 1, q, k], or None where every query sees every key.

    Returns:
        [batch, q, heads, head_dim].
    """
    grouped = query.unflatten(2, (key.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [batch, K/V heads, group, q, head_dim]
    group = grouped.shape[2]
    if visible is not None:
        visible = visible[:, None, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(grouped.flatten(2, 3), key, value, attn_mask=visible)
    return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _causal(query, key, value):
    """Causal attention of whole sequences [batch, n, heads, head_dim], K/V heads for key and value."""
    q, k, v = (rows.transpose(1, 2) for rows in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _takes_kernels(query):
    """Whether the Triton kernels of the package that trained the model are here, and take these heads."""
    size = query.shape[-1] * query.element_size()
    return ksa_attention is not None and query.is_cuda and query.shape[-1] <= 256 and size % 16 == 0


class MegatronKSAAttention(nn.Module):
    """Self-attention of one layer of the kind `kind`; `window` is W, or None where text sees all text before."""

    def __init__(self, config, kind, window):
        super().__init__()
        self.config, self.window = config, window
        self.has_summaries, self.sees_summaries = kind in "kl", kind == "k"
        hidden, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        kv = config.num_key_value_heads * dim
        suffixes = [""]
        if self.has_summaries and config.summary_independent_parameters:
            suffixes.append("_summary")
        for suffix in suffixes:
            for name, width in (("q", config.num_attention_heads * dim), ("k", kv), ("v", kv)):
                setattr(self, f"{name}_proj{suffix}", nn.Linear(hidden, width, bias=bias))
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        if config.qk_norm:
            apart = self.has_summaries and config.summary_independent_qk_norm
            for suffix in ("", "_summary") if apart else ("",):
                for name in "qk":
                    setattr(self, f"{name}_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))

    def _project(self, rows, suffix, norm_suffix):
        q, k, v = (
            getattr(self, f"{name}_proj{suffix}")(rows).unflatten(-1, (-1, self.config.head_dim)) for name in "qkv"
        )
        if self.config.qk_norm:
            q, k = getattr(self, f"q_norm{norm_suffix}")(q), getattr(self, f"k_norm{norm_suffix}")(k)
        return q, k, v

    def _project_summaries(self, rows):
        """q, k, v = a * summary projection + (1 - a) * text projection."""
        config, a = self.config, self.config.mix_coeff
        norm = "_summary" if config.summary_independent_qk_norm else ""
        if not config.summary_independent_parameters or a == 0:
            return self._project(rows, "", norm)
        mixed = self._project(rows, "_summary", norm)
        if a == 1:
            return mixed
        return tuple(a * s + (1 - a) * t for s, t in zip(mixed, self._project(rows, "", ""), strict=True))

    def forward(self, hidden, rows, cache):
        """hidden [batch, rows, hidden]: text and summary rows, or text alone where the layer has no summaries."""
        interleaved = self.config.rotary_interleaved
        text, summaries = rows.split(hidden)
        turn, turn_summaries = zip(*(rows.split(part) for part in rows.rotation), strict=True)
        q, k, v = self._project(text, "", "")
        q, k = _rotate(q, turn, interleaved), _rotate(k, turn, interleaved)
        summary_q, summary_k, summary_v = (part[:, :0] for part in (q, k, v))
        if summaries.shape[1]:
            summary_q, summary_k, summary_v = self._project_summaries(summaries)
            summary_q, summary_k = (_rotate(part, turn_summaries, interleaved) for part in (summary_q, summary_k))
        text, summaries = (q, k, v), (summary_q, summary_k, summary_v)
        if cache is not None and _takes_kernels(q) and cache.steps(q, rows):
            return self.o_proj(cache.step(text, summaries, rows).flatten(2))
        if cache is not None:
            cache.write(text[1:], summaries[1:], rows)
        out = self._whole(text, summaries, rows) if rows.fresh else self._from_cache(q, summaries, rows, cache)
        return self.o_proj(out.flatten(2))

    def _whole(self, text, summaries, rows):
        """Attention output of sequences from their first tokens on: [batch, rows, heads, head_dim]."""
        if self.window is not None and _takes_kernels(text[0]):
            geometry = KSAGeometry(rows.chunk, rows.per_chunk if self.sees_summaries else 0, self.window)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, summaries, strict=True))
            return ksa_attention(q, k, v, geometry, text_rows=rows.num_text)
        if self.window is None:
            out = [_causal(*text)]
        else:
            begins = range(0, rows.num_text, QUERY_BLOCK)
            out = [
                self._block(text, summaries[1:], begin, min(begin + QUERY_BLOCK, rows.num_text), rows)
                for begin in begins
            ]
        if summaries[0].shape[1]:
            size = rows.num_chunks * rows.chunk
            out.append(self._read_chunks(summaries, [part[:, :size] for part in text[1:]], rows))
        return torch.cat(out, dim=1)

    def _block(self, text, summaries, begin, end, rows):
        """Text queries begin .. end - 1 against the text of their windows and the summaries of older chunks."""
        chunk, query = rows.chunk, text[0]
        first = max(begin // chunk - self.window, 0) * chunk
        older = max((end - 1) // chunk - self.window, 0) * rows.per_chunk * self.sees_summaries
        i = torch.arange(begin, end, device=query.device)[:, None]
        j = torch.arange(first, end, device=query.device)
        near = (j <= i) & (i // chunk - j // chunk <= self.window)
        far = i // chunk - torch.arange(older, device=query.device) // max(rows.per_chunk, 1) > self.window
        key, value = (
            torch.cat([t[:, first:end], s[:, :older]], dim=1).transpose(1, 2)
            for t, s in zip(text[1:], summaries, strict=True)
        )
        return _attend(query[:, begin:end], key, value, torch.cat([near, far], dim=1)[None])

    def _from_cache(self, query, summaries, rows, cache):
        """Attention output of the newest rows, whose keys and values are in the cache."""
        older = 0
        if self.sees_summaries:
            older = max(rows.last_token // rows.chunk - self.window, 0) * rows.per_chunk
        visible = rows.visible(self.window, cache.text_rows, older)
        length = rows.last_token + 1 if visible is None else visible.shape[2]
        out = [_attend(query, *cache.view(length), visible)]
        if summaries[0].shape[1]:
            out.append(self._read_chunks(summaries, cache.chunk_text(rows), rows))
        return torch.cat(out, dim=1)

    @staticmethod
    def _read_chunks(summaries, text, rows):
        """Summary queries: each reads its chunk's text, and its chunk's summaries up to itself.

        Args:
            summaries: queries, keys and values of the summaries, [batch, chunks * S, heads, head_dim].
            text: keys and values of the chunks' text, [batch, chunks * C, K/V heads, head_dim].
        """

        def by_chunk(tensor):
            return tensor.unflatten(1, (rows.num_chunks, -1)).flatten(0, 1)

        key, value = (
            torch.cat([by_chunk(t), by_chunk(s)], dim=1).transpose(1, 2)
            for t, s in zip(text, summaries[1:], strict=True)
        )
        among = torch.ones(rows.per_chunk, rows.per_chunk, dtype=torch.bool, device=key.device).tril()
        visible = torch.cat([among.new_ones(rows.per_chunk, rows.chunk), among], dim=1)
        return (
            _attend(by_chunk(summaries[0]), key, value, visible[None]).unflatten(0, (-1, rows.num_chunks)).flatten(1, 2)
        )
