"""Decoder with Kwai Summary Attention (KSA, arXiv 2604.24432) and HARPE (arXiv 2412.07171), for transformers.

Rows of a forward pass are laid out `[text | summaries]`: the new text tokens, then S summary rows for each chunk of C
text tokens that they complete. Text queries see the text of the running chunk and of the W chunks before it, and the
summaries of older chunks; summary queries read their own chunk. Summary rows leave before the final norm.

Samples of a batch may be padded on either side. Chunks and positions are counted from a sample's first token, so each
sample's tokens are moved to the left of its row on the way in, and back on the way out.

| letter | layer | text sees | summary rows |
|---|---|---|---|
| k | KSA | its window as text, older chunks as summaries | read their chunk |
| l | large window | all text before | read their chunk |
| f | full | all text before | skip the layer |
| w | window | its window | skip the layer |
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .cache_megatron_ksa import SEGMENT, KSACache
from .configuration_megatron_ksa import MegatronKSAConfig
from .rows_megatron_ksa import Rows, alignment

try:
    from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention
except ImportError:
    KSAGeometry = ksa_attention = None

logger = logging.get_logger(__name__)

# By this list Trainer knows that label smoothing shifts the labels, and `pipeline` that the model writes text.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MegatronKSAConfig.model_type] = "MegatronKSAForCausalLM"
# Text queries that attend at a time in plain PyTorch: bounds the mask of a long prompt.
QUERY_BLOCK = 1024


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


def _rotation(config, positions, dtype):
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
            own = self.has_summaries and config.summary_independent_qk_norm
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

    def forward(self, hidden, rows, cache):
        """hidden [batch, rows, hidden]: text and summary rows, or text alone where the layer has no summaries."""
        interleaved = self.config.rotary_interleaved
        text, own = rows.split(hidden)
        turn, turn_own = zip(*(rows.split(part) for part in rows.rotation), strict=True)
        q, k, v = self._project(text, "", "")
        q, k = _rotate(q, turn, interleaved), _rotate(k, turn, interleaved)
        own_q, own_k, own_v = (part[:, :0] for part in (q, k, v))
        if own.shape[1]:
            own_q, own_k, own_v = self._project_summaries(own)
            own_q, own_k = _rotate(own_q, turn_own, interleaved), _rotate(own_k, turn_own, interleaved)
        text, own = (q, k, v), (own_q, own_k, own_v)
        if cache is not None and _takes_kernels(q) and cache.steps(q, rows):
            return self.o_proj(cache.step(text, own, rows).flatten(2))
        if cache is not None:
            cache.write(text[1:], own[1:], rows)
        out = self._whole(text, own, rows) if rows.fresh else self._from_cache(q, own, rows, cache)
        return self.o_proj(out.flatten(2))

    def _whole(self, text, own, rows):
        """Attention output of sequences from their first tokens on: [batch, rows, heads, head_dim]."""
        if self.window is not None and _takes_kernels(text[0]):
            geometry = KSAGeometry(rows.chunk, rows.per_chunk if self.sees_summaries else 0, self.window)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, own, strict=True))
            return ksa_attention(q, k, v, geometry, text_rows=rows.num_text)
        if self.window is None:
            out = [_causal(*text)]
        else:
            begins = range(0, rows.num_text, QUERY_BLOCK)
            out = [self._block(text, own[1:], begin, min(begin + QUERY_BLOCK, rows.num_text), rows) for begin in begins]
        if own[0].shape[1]:
            size = rows.num_chunks * rows.chunk
            out.append(self._read_chunks(own, [part[:, :size] for part in text[1:]], rows))
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

    def _from_cache(self, query, own, rows, cache):
        """Attention output of the newest rows, whose keys and values are in the cache."""
        older = 0
        if self.sees_summaries:
            older = max(rows.last_token // rows.chunk - self.window, 0) * rows.per_chunk
        visible = rows.visible(self.window, cache.text_rows, older)
        length = rows.last_token + 1 if visible is None else visible.shape[2]
        out = [_attend(query, *cache.view(length), visible)]
        if own[0].shape[1]:
            out.append(self._read_chunks(own, cache.chunk_text(rows), rows))
        return torch.cat(out, dim=1)

    @staticmethod
    def _read_chunks(own, text, rows):
        """Summary queries: each reads its chunk's text, and its chunk's summaries up to itself.

        Args:
            own: queries, keys and values of the summaries, [batch, chunks * S, heads, head_dim].
            text: keys and values of the chunks' text, [batch, chunks * C, K/V heads, head_dim].
        """

        def by_chunk(tensor):
            return tensor.unflatten(1, (rows.num_chunks, -1)).flatten(0, 1)

        key, value = (
            torch.cat([by_chunk(t), by_chunk(s)], dim=1).transpose(1, 2) for t, s in zip(text, own[1:], strict=True)
        )
        among = torch.ones(rows.per_chunk, rows.per_chunk, dtype=torch.bool, device=key.device).tril()
        visible = torch.cat([among.new_ones(rows.per_chunk, rows.chunk), among], dim=1)
        return _attend(by_chunk(own[0]), key, value, visible[None]).unflatten(0, (-1, rows.num_chunks)).flatten(1, 2)


class MegatronKSAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegatronKSADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer; summary rows skip it where it has none."""

    def __init__(self, config, index):
        super().__init__()
        kind = config.layer_kinds[index]
        self.self_attn = MegatronKSAAttention(config, kind, config.layer_windows[index])
        self.mlp = MegatronKSAMLP(config)
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        if self.self_attn.has_summaries and config.summary_independent_attention_layernorm:
            self.input_layernorm_summary = _Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)

    def _input_norm(self, hidden, rows):
        if not hasattr(self, "input_layernorm_summary"):
            return self.input_layernorm(hidden)
        text, summaries = rows.split(hidden)
        return torch.cat([self.input_layernorm(text), self.input_layernorm_summary(summaries)], dim=1)

    def forward(self, hidden, rows, cache):
        """hidden [batch, rows, hidden] -> the same shape."""
        rows, skipping = rows.to(hidden.device), None
        if not self.self_attn.has_summaries:
            hidden, skipping = rows.split(hidden)
        hidden = hidden + self.self_attn(self._input_norm(hidden, rows), rows, cache)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden if skipping is None else torch.cat([hidden, skipping], dim=1)


class MegatronKSAPreTrainedModel(PreTrainedModel):
    """What both models tell the transformers library."""

    config_class = MegatronKSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegatronKSADecoderLayer"]
    _supports_sdpa = True


class MegatronKSAModel(MegatronKSAPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegatronKSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KSACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the text tokens, [batch, n, hidden]; arguments as in `MegatronKSAForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embeds.dim() != 3 or not embeds.numel():
            raise ValueError(
                f"tokens of shape {tuple(embeds.shape[:-1])}: [batch, columns] needed, at least one of each"
            )
        batch, columns, _ = embeds.shape
        cache = self._cache(past_key_values, use_cache)
        align = alignment(attention_mask, batch, columns, 0 if cache is None else cache.columns)
        counts = [columns] * batch if align is None else align.counts
        if position_ids is not None:
            position_ids = position_ids.to(embeds.device)
        self._check_shape(position_ids, batch, columns)
        if align is not None:
            embeds = align.pack(embeds)
            position_ids = position_ids if position_ids is None else align.pack(position_ids.expand(batch, -1))
        self._check_positions(position_ids, counts, columns)
        filled = cache is not None and bool(cache.tokens)
        states, begin = [], 0
        for piece in embeds.split(SEGMENT, dim=1) if filled else (embeds,):
            end = begin + piece.shape[1]
            here = [min(max(count - begin, 0), end - begin) for count in counts]
            own = None if position_ids is None else position_ids[:, begin:end]
            states.append(self._segment(piece, own, here, cache, output_hidden_states))
            begin = end
        if cache is not None:
            cache.columns += columns
        hidden = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*states, strict=True)]
        if align is not None:
            hidden = [align.unpack(part) for part in hidden]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )

    def _cache(self, given, use_cache):
        """The cache to write, or None."""
        if given is not None:
            if not isinstance(given, KSACache):
                raise ValueError(f"past_key_values is a {type(given).__name__}: this model takes a KSACache or None")
            if given.tokens and self.training and torch.is_grad_enabled():
                raise ValueError("no gradients flow through a cache: train without past_key_values")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("`use_cache=True` is off while gradient checkpointing recomputes layers")
            use_cache = False
        return KSACache(self.config) if use_cache else None

    @staticmethod
    def _check_shape(positions, batch, columns):
        if positions is not None and tuple(positions.shape) not in ((batch, columns), (1, columns)):
            shape = tuple(positions.shape)
            raise ValueError(f"position_ids of shape {shape}: [{batch}, {columns}] or [1, {columns}] needed")

    @staticmethod
    def _check_positions(positions, counts, columns):
        if positions is None or columns == 1:
            return
        token = (
            torch.arange(1, columns, device=positions.device) < torch.tensor(counts, device=positions.device)[:, None]
        )
        if ((positions.diff(dim=1) <= 0) & token).any():
            raise ValueError("position_ids start again within a row: packed documents are not supported, pad instead")

    def _segment(self, hidden, positions, counts, cache, output_hidden_states):
        """Hidden states [batch, n, hidden] of tokens that go on where the cache ends: the last, or one a layer too."""
        batch, length, device = len(hidden), hidden.shape[1], hidden.device
        starts = (cache.tokens if cache is not None else None) or [0] * batch
        if len(starts) != batch:
            raise ValueError(f"past_key_values holds {len(starts)} samples, the batch has {batch}")
        rows = Rows(self.config, starts, counts, length, device)
        if rows.num_summaries:
            tokens = self.config.vocab_size - rows.per_chunk + torch.arange(rows.per_chunk, device=device)
            summaries = self.embed_tokens(tokens.repeat(rows.num_chunks).expand(batch, -1))
            hidden = torch.cat([hidden, summaries.to(hidden.dtype)], dim=1)
        earlier = None if cache is None else cache.positions
        text = rows.token if positions is None else positions
        rows.rotation = _rotation(self.config, rows.positions(text, earlier), hidden.dtype)
        if cache is not None:
            cache.reserve(max(starts) + length)
            rows.room = cache.room
            cache.positions = rows.newest_positions(text, earlier).expand(batch, -1)
            cache.tokens = [start + count for start, count in zip(starts, counts, strict=True)]
        states = []
        for layer, layer_cache in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
            if output_hidden_states:
                states.append(rows.split(hidden)[0])
            hidden = layer(hidden, rows, layer_cache)
        return [*states, self.norm(rows.split(hidden)[0])]


class MegatronKSAForCausalLM(MegatronKSAPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # The cache cannot be cut back, as assisted decoding would need.
    _is_stateful = True
    # Trainer hands `num_items_in_batch` to forward.
    accepts_loss_kwargs = True

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

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Room for `new_num_tokens` text tokens; the summary tokens stay the last rows of the embedding.

        The vocabulary of the configuration counts both.
        """
        summaries = self.config.summary_rows
        text = self.config.vocab_size - summaries
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        given = text if new_num_tokens is None else new_num_tokens
        size = given if pad_to_multiple_of is None else -(-given // pad_to_multiple_of) * pad_to_multiple_of
        kept = [part.weight[text:].detach().clone() for part in (self.get_input_embeddings(), self.lm_head)]
        for rows in (text, size, size + summaries):
            super().resize_token_embeddings(rows, mean_resizing=mean_resizing and rows == size)
        with torch.no_grad():
            for part, own in zip((self.get_input_embeddings(), self.lm_head), kept, strict=True):
                part.weight[size:] = own
        if size != text:
            # The second one is for programs that read the configuration.
            for name in ("truncate_predict_nums", "summary_token_begin"):
                if getattr(self.config, name, None) is not None:
                    setattr(self.config, name, size)
        return self.get_input_embeddings()

    def compute_transition_scores(self, sequences, scores, *args, **kwargs):
        """As the library's, which takes scores of the whole vocabulary: summary tokens are never written."""
        missing = self.config.vocab_size - scores[0].shape[-1]
        padded = tuple(F.pad(part, (0, missing), value=-math.inf) for part in scores)
        return super().compute_transition_scores(sequences, padded, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """A cache with room for the longest sequence that `generate` may write."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has its own cache, "
                "leave it out"
            )
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = KSACache(self.config, max_cache_length)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """The tokens that the cache has not seen; their positions come from the mask.

        `generate` counts positions on after the last column, which is padding where a prompt is padded on the right.
        """
        held, new = 0 if past_key_values is None else past_key_values.columns, kwargs.get("next_sequence_length")
        if new is not None and new <= 0:
            raise ValueError(
                f"past_key_values holds {held} columns, the inputs have {held + new}: give generate all of them, with "
                "new ones at the end"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration, **kwargs,
        )  # fmt: skip
        # `generate` hands on what found its stop strings.
        for name in ("tokenizer", "assistant_tokenizer"):
            inputs.pop(name, None)
        positions, mask = inputs.pop("position_ids", None), inputs.get("attention_mask")
        if is_first_iteration and positions is not None:
            columns = positions.shape[-1]
            if mask is None:
                mask = torch.ones(1, held + columns, dtype=torch.long, device=positions.device)
            counted = mask.long().cumsum(1) - 1
            if ((counted[:, -columns:] != positions) & mask[:, -columns:].bool()).any():
                raise ValueError("generate takes positions from attention_mask: leave position_ids out")
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KSACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, n, text vocabulary] of the tokens given, which go on where the cache ends.

        Args:
            input_ids: int64 [batch, n]; or inputs_embeds, [batch, n, hidden].
            attention_mask: [batch, n] or [batch, columns so far], 0 for padding, anywhere. Logits at padding mean
                nothing.
            position_ids: int64 [batch or 1, n], increasing in every row; by default tokens are counted, padding not.
            past_key_values: `KSACache` of the tokens before; it is written.
            labels: int64 [batch, n]; -100 is ignored, and what padding would predict. The loss is that of the next
                token.
            logits_to_keep: give logits for the last so many tokens of each sample, padding left out; 0 for all.
            num_items_in_batch: the loss is the sum over the labels divided by it, in place of their mean.

        Raises:
            ValueError: inputs that do not fit each other, packed documents, attention weights.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: attention weights are never formed, leave it out")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        hidden, columns, align = out.last_hidden_state, out.last_hidden_state.shape[1], None
        if attention_mask is not None and (logits_to_keep or labels is not None):
            align = alignment(attention_mask, len(hidden), columns, attention_mask.shape[1] - columns)
        if logits_to_keep:
            kept = min(logits_to_keep, columns)
            hidden = hidden[:, -kept:] if align is None else align.last(hidden, kept)
        logits = self.lm_head(hidden)[..., : self.config.truncate_predict_nums]
        loss = None if labels is None else _loss(logits, labels, align, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return output.to_tuple() if return_dict is False else output


def _loss(logits, labels, align, num_items_in_batch):
    """Cross-entropy of the next token."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: {tuple(logits.shape[:2])} needed, a label a token")
    labels = labels[:, 1:].to(logits.device)
    if align is not None:
        labels = labels.masked_fill(~align.mask[:, :-1].to(labels.device), -100)
    rows = logits[:, :-1].float().flatten(0, 1)
    if num_items_in_batch is None:
        return F.cross_entropy(rows, labels.flatten())
    total = F.cross_entropy(rows, labels.flatten(), reduction="sum")
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)
