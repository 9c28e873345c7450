"""Decoder with Kwai Summary Attention (KSA, arXiv 2604.24432) and HARPE (arXiv 2412.07171), for transformers.

Rows of a forward pass are laid out `[text | summaries]`: the new text tokens, then S summary rows for each chunk of C
text tokens that they complete. Text queries see the text of the running chunk and of the W chunks before it, and the
summaries of older chunks; summary queries read their own chunk. Summary rows leave before the final norm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megatron_ksa import MegatronKSAConfig

# Text queries that attend at a time: bounds the mask of a long prompt.
QUERY_BLOCK = 1024


class _LayerCache:
    """Rotated keys and values of one layer: text from token `first` on, and summaries.

    Each is a pair of [batch, rows, K/V heads, head_dim], or None before the first rows.
    """

    def __init__(self):
        self.first = 0
        self.text = None
        self.summaries = None

    def append(self, name, rows):
        old = getattr(self, name)
        rows = rows if old is None else tuple(torch.cat(pair, dim=1) for pair in zip(old, rows, strict=True))
        setattr(self, name, rows)
        return rows

    def drop_text_before(self, token):
        if token > self.first:
            self.text = tuple(rows[:, token - self.first :] for rows in self.text)
            self.first = token


class KSACache:
    """What decoding keeps: the text of each layer's window, and every summary.

    The model's first forward pass makes it.
    """

    is_compileable = False

    def __init__(self, num_layers):
        self.seen = 0
        self.layers = [_LayerCache() for _ in range(num_layers)]

    def get_seq_length(self, layer_idx=0):
        """Text tokens so far."""
        return self.seen

    def reorder_cache(self, beam_idx):
        """Choose samples of the batch, for beam search."""
        for layer in self.layers:
            for name in ("text", "summaries"):
                rows = getattr(layer, name)
                if rows is not None:
                    setattr(layer, name, tuple(r.index_select(0, beam_idx.to(r.device)) for r in rows))


class _Norm(nn.Module):
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


def _angles(config, positions):
    """Rotary angles of positions [rows]: float32 [1, rows, KV groups or 1, d_rot]."""
    positions = positions.to(torch.float32)
    if config.rotary_interpolation is not None:
        positions = positions * (1 / config.rotary_interpolation)
    angles = positions[None, :, None, None] * _inverse_frequencies(config, positions.device)
    if config.rotary_interleaved:
        return torch.stack([angles] * 2, dim=-1).flatten(-2)
    return torch.cat([angles] * 2, dim=-1)


def _rotate(heads, angles, interleaved):
    """Rotate the leading channels of heads [batch, rows, heads, head_dim]; a query head has its KV group's angles."""
    if angles.shape[2] > 1:
        angles = angles.repeat_interleave(heads.shape[2] // angles.shape[2], dim=2)
    turned, kept = heads[..., : angles.shape[-1]], heads[..., angles.shape[-1] :]
    if interleaved:
        half = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        half = torch.cat([-high, low], dim=-1)
    turned = turned * angles.cos().to(heads.dtype) + half * angles.sin().to(heads.dtype)
    return torch.cat([turned, kept], dim=-1)


def _attend(query, key, value, visible):
    """Softmax attention: query [batch, q, heads, dim], key and value [batch, k, K/V heads, dim], visible [q, k]."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (rows.repeat_interleave(repeats, dim=2) for rows in (key, value))
    out = F.scaled_dot_product_attention(*(rows.transpose(1, 2) for rows in (query, key, value)), attn_mask=visible)
    return out.transpose(1, 2)


class _Rows:
    """Rows of a forward pass: text tokens start .. end - 1, and the summaries of the chunks that they complete."""

    def __init__(self, config, start, length, device):
        self.start, self.end = start, start + length
        self.chunk = config.summary_chunk_size if config.use_summary_attention else 1
        self.per_chunk = config.summary_token_num if config.use_summary_attention else 0
        self.first_chunk, self.last_chunk = start // self.chunk, self.end // self.chunk
        text = torch.arange(self.start, self.end, device=device)
        chunks = torch.arange(self.first_chunk, self.last_chunk, device=device)[:, None] * self.chunk
        s = torch.arange(self.per_chunk, device=device)
        last = (s + 1) * self.chunk // max(self.per_chunk, 1) - 1
        self.positions = torch.cat([text, (chunks + last.clamp(min=0)).flatten()])
        self.num_text = length
        self.num_summaries = (self.last_chunk - self.first_chunk) * self.per_chunk

    def split(self, rows):
        return rows[:, : self.num_text], rows[:, self.num_text :]


class MegatronKSAAttention(nn.Module):
    """Self-attention of one layer; `window` is W, or None in a full layer."""

    def __init__(self, config, window):
        super().__init__()
        self.config, self.window = config, window
        hidden, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        kv = config.num_key_value_heads * dim
        suffixes = [""]
        if window is not None and config.summary_independent_parameters:
            suffixes.append("_summary")
        for suffix in suffixes:
            for name, width in (("q", config.num_attention_heads * dim), ("k", kv), ("v", kv)):
                setattr(self, f"{name}_proj{suffix}", nn.Linear(hidden, width, bias=bias))
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        if config.qk_norm:
            own = window is not None and config.summary_independent_qk_norm
            for suffix in ("", "_summary") if own else ("",):
                for name in "qk":
                    setattr(self, f"{name}_norm{suffix}", _Norm(dim, config.rms_norm_eps))

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
        own = self._project(rows, "_summary", norm)
        if a == 1:
            return own
        return tuple(a * o + (1 - a) * s for o, s in zip(own, self._project(rows, "", ""), strict=True))

    def forward(self, hidden, angles, rows, cache):
        """hidden [batch, rows, hidden]; a full layer gets and returns text rows only."""
        interleaved = self.config.rotary_interleaved
        text, summaries = rows.split(hidden) if self.window is not None else (hidden, None)
        q, k, v = self._project(text, "", "")
        text_angles, summary_angles = rows.split(angles)
        q, k = _rotate(q, text_angles, interleaved), _rotate(k, text_angles, interleaved)
        key, value = cache.append("text", (k, v))
        if self.window is None:
            index = torch.arange(rows.end, device=q.device)
            out = [
                _attend(block, key[:, : end + 1], value[:, : end + 1], index[start : end + 1, None] >= index[: end + 1])
                for block, start, end in self._blocks(q, rows)
            ]
            return self.o_proj(torch.cat(out, dim=1).flatten(2))
        summary_q, k, v = self._project_summaries(summaries)
        summary_q, k = _rotate(summary_q, summary_angles, interleaved), _rotate(k, summary_angles, interleaved)
        summary_key, summary_value = cache.append("summaries", (k, v))
        out = [
            self._text_block(block, start, end, (key, value), (summary_key, summary_value), cache.first, rows)
            for block, start, end in self._blocks(q, rows)
        ]
        if rows.num_summaries:
            out.append(self._summary_rows(summary_q, (key, value), (k, v), cache.first, rows))
        cache.drop_text_before((rows.last_chunk - self.window) * rows.chunk)
        return self.o_proj(torch.cat(out, dim=1).flatten(2))

    @staticmethod
    def _blocks(query, rows):
        """Blocks of text queries with their first and last token."""
        for begin in range(0, rows.num_text, QUERY_BLOCK):
            block = query[:, begin : min(begin + QUERY_BLOCK, rows.num_text)]
            yield block, rows.start + begin, rows.start + begin + block.shape[1] - 1

    def _text_block(self, query, start, end, text, summaries, first, rows):
        """Text queries start .. end against the text of their windows and the summaries of older chunks."""
        chunk, per_chunk, device = rows.chunk, rows.per_chunk, query.device
        begin = max(first, (start // chunk - self.window) * chunk)
        i = torch.arange(start, end + 1, device=device)[:, None]
        j = torch.arange(begin, end + 1, device=device)
        near = (j <= i) & (i // chunk - j // chunk <= self.window)
        older = max(end // chunk - self.window, 0) * per_chunk
        far = i // chunk - torch.arange(older, device=device) // per_chunk > self.window
        keys, values = (
            torch.cat([t[:, begin - first : end + 1 - first], s[:, :older]], dim=1)
            for t, s in zip(text, summaries, strict=True)
        )
        return _attend(query, keys, values, torch.cat([near, far], dim=1))

    def _summary_rows(self, query, text, summaries, first, rows):
        """Summary queries of the new chunks: each reads its chunk's text, and its chunk's summaries up to itself."""
        chunks = rows.last_chunk - rows.first_chunk
        begin = rows.first_chunk * rows.chunk - first

        def by_chunk(tensor):
            return tensor.unflatten(1, (chunks, -1)).flatten(0, 1)

        keys, values = (
            torch.cat([by_chunk(t[:, begin : begin + chunks * rows.chunk]), by_chunk(s)], dim=1)
            for t, s in zip(text, summaries, strict=True)
        )
        own = torch.ones(rows.per_chunk, rows.per_chunk, dtype=torch.bool, device=query.device).tril()
        visible = torch.cat([own.new_ones(rows.per_chunk, rows.chunk), own], dim=1)
        return _attend(by_chunk(query), keys, values, visible).unflatten(0, (-1, chunks)).flatten(1, 2)


class MegatronKSAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegatronKSADecoderLayer(nn.Module):
    """Pre-norm layer; summary rows skip a full layer."""

    def __init__(self, config, index):
        super().__init__()
        is_ksa = config.use_summary_attention and bool(config.summary_layer_freq[index])
        self.is_ksa = is_ksa
        self.self_attn = MegatronKSAAttention(config, config.summary_windows[index] if is_ksa else None)
        self.mlp = MegatronKSAMLP(config)
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        if is_ksa and config.summary_independent_attention_layernorm:
            self.input_layernorm_summary = _Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)

    def _input_norm(self, hidden, rows):
        if not hasattr(self, "input_layernorm_summary"):
            return self.input_layernorm(hidden)
        text, summaries = rows.split(hidden)
        return torch.cat([self.input_layernorm(text), self.input_layernorm_summary(summaries)], dim=1)

    def forward(self, hidden, angles, rows, cache):
        skipping = None
        if not self.is_ksa:
            hidden, skipping = rows.split(hidden)
        hidden = hidden + self.self_attn(self._input_norm(hidden, rows), angles, rows, cache)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden if skipping is None else torch.cat([hidden, skipping], dim=1)


class MegatronKSAPreTrainedModel(PreTrainedModel):
    config_class = MegatronKSAConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegatronKSADecoderLayer"]
    _supports_sdpa = True


class MegatronKSAModel(MegatronKSAPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegatronKSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, cache: KSACache) -> Tensor:
        """Final hidden states of the text tokens: [batch, n] -> [batch, n, hidden]."""
        rows = _Rows(self.config, cache.seen, input_ids.shape[1], input_ids.device)
        hidden = self.embed_tokens(input_ids)
        if rows.num_summaries:
            tokens = self.config.vocab_size - rows.per_chunk + torch.arange(rows.per_chunk, device=input_ids.device)
            tokens = tokens.repeat(rows.last_chunk - rows.first_chunk).expand(len(input_ids), -1)
            hidden = torch.cat([hidden, self.embed_tokens(tokens)], dim=1)
        angles = _angles(self.config, rows.positions)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, angles, rows, layer_cache)
        cache.seen = rows.end
        return self.norm(rows.split(hidden)[0])


class MegatronKSAForCausalLM(MegatronKSAPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # The cache cannot be cut back, as assisted decoding would need.
    _is_stateful = True

    def __init__(self, config):
        super().__init__(config)
        self.model = MegatronKSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **kwargs
    ):
        """The tokens that the cache has not seen."""
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KSACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, n, text vocabulary] of the tokens given, which go on where the cache ends.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, tokens so far]; padding may only be on the right, where it changes nothing.
            labels: int64 [batch, n]; -100 is ignored. The loss is that of the next token.
            logits_to_keep: last tokens to give logits for; 0 for all.

        Raises:
            ValueError: padding before a token: chunks are counted from the first one.
        """
        if attention_mask is not None and attention_mask.shape[1] > 1:
            mask = attention_mask.bool()
            if (mask[:, 1:] & ~mask[:, :-1]).any():
                raise ValueError("padding on the left is not supported: pad on the right, or generate one by one")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = KSACache(self.config.num_hidden_layers) if past_key_values is None else past_key_values
        hidden = self.model(input_ids, cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        logits = logits[..., : self.config.truncate_predict_nums]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].to(logits.device).flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output
