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

from .attention_megatron_ksa import MegatronKSAAttention, RMSNorm, rotation_at
from .cache_megatron_ksa import SEGMENT, KSACache
from .configuration_megatron_ksa import MegatronKSAConfig
from .rows_megatron_ksa import Rows, alignment

logger = logging.get_logger(__name__)

# By this list Trainer knows that label smoothing shifts the labels, and `pipeline` that the model writes text.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MegatronKSAConfig.model_type] = "MegatronKSAForCausalLM"


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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.self_attn.has_summaries and config.summary_independent_attention_layernorm:
            self.input_layernorm_summary = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        rows.rotation = rotation_at(self.config, rows.positions(text, earlier), hidden.dtype)
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
