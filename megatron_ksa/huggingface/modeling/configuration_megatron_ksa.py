"""Configuration of a decoder with Kwai Summary Attention (arXiv 2604.24432) and HARPE (arXiv 2412.07171)."""

from transformers import PretrainedConfig


class MegatronKSAConfig(PretrainedConfig):
    """Settings of `MegatronKSAForCausalLM`; without KSA and HARPE a Llama- or Qwen-like decoder.

    Args:
        vocab_size: rows of the embedding: text tokens, then the summary tokens.
        num_key_value_heads: KV groups.
        qkv_bias: Q, K and V projections have biases.
        qk_norm: RMS norm over the channels of each query and key head.
        rotary_base: RoPE base of all heads, where `rotary_bases` is None.
        rotary_bases: HARPE, a RoPE base for each KV group.
        rotary_percent: share of a head's channels that is rotated.
        rotary_interleaved: neighbouring channels are rotated, instead of halves.
        rotary_llama3_factor: factor of Llama 3's frequency scaling, or None.
        rotary_interpolation: positions are divided by it, or None.
        use_summary_attention: KSA is on.
        summary_chunk_size: C, text tokens in a chunk.
        summary_token_num: S, summary tokens after each chunk.
        summary_layer_freq: for each layer 1 where summary rows go through it, 0 where they skip it.
        summary_layer_kinds: for each layer k (KSA), l (KSA with a window over everything), f (full attention) or w (the
            window alone); by default from `summary_layer_freq`.
        summary_windows: for each layer W, past chunks seen as text.
        summary_independent_parameters: KSA layers have Q, K and V projections for summary rows.
        summary_independent_qk_norm: KSA layers have Q and K norms for summary rows.
        summary_independent_attention_layernorm: KSA layers have an input norm for summary rows.
        mix_coeff: a, weight of the summary projections on summary rows; 1 - a is that of the text projections.
        truncate_predict_nums: text tokens; logits beyond are cut.
    """

    model_type = "megatron_ksa"
    EVERYTHING = 2**30  # chunks of a window over the whole sequence
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        rotary_base=10000,
        rotary_bases=None,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_llama3_factor=None,
        rotary_interpolation=None,
        use_summary_attention=False,
        summary_chunk_size=8,
        summary_token_num=1,
        summary_layer_freq=None,
        summary_layer_kinds=None,
        summary_windows=None,
        summary_independent_parameters=True,
        summary_independent_qk_norm=False,
        summary_independent_attention_layernorm=False,
        mix_coeff=1.0,
        truncate_predict_nums=None,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.rotary_base = rotary_base
        self.rotary_bases = rotary_bases
        self.rotary_percent = rotary_percent
        self.rotary_interleaved = rotary_interleaved
        self.rotary_llama3_factor = rotary_llama3_factor
        self.rotary_interpolation = rotary_interpolation
        self.use_summary_attention = use_summary_attention
        self.summary_chunk_size = summary_chunk_size
        self.summary_token_num = summary_token_num
        self.summary_layer_freq = summary_layer_freq
        self.summary_layer_kinds = summary_layer_kinds
        self.summary_windows = summary_windows
        self.summary_independent_parameters = summary_independent_parameters
        self.summary_independent_qk_norm = summary_independent_qk_norm
        self.summary_independent_attention_layernorm = summary_independent_attention_layernorm
        self.mix_coeff = mix_coeff
        self.truncate_predict_nums = truncate_predict_nums
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def layer_kinds(self):
        """Each layer's letter: k, l, f or w."""
        if not self.use_summary_attention:
            return ["f"] * self.num_hidden_layers
        if self.summary_layer_kinds is not None:
            return list(self.summary_layer_kinds)
        pairs = zip(self.summary_layer_freq, self.summary_windows, strict=True)
        return [("l" if window >= self.EVERYTHING else "k") if freq else "f" for freq, window in pairs]

    @property
    def layer_windows(self):
        """Each layer's W, None where text sees all text before."""
        if not self.use_summary_attention:
            return [None] * self.num_hidden_layers
        pairs = zip(self.layer_kinds, self.summary_windows, strict=True)
        return [window if kind in "kw" else None for kind, window in pairs]

    @property
    def summary_rows(self):
        """S, summary rows of a chunk; 0 in a model whose layers have none."""
        return self.summary_token_num if any(kind in "kl" for kind in self.layer_kinds) else 0
