"""What a decoder is, apart from how Megatron or the transformers library spell it."""

from dataclasses import dataclass, field

from megatron_ksa.config.ksa import KSAConfig, KSALayer, LayerKind


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with rotary positions, RMS norms and SwiGLU: Llama, Qwen 2 and 3, KSA and HARPE models.

    Attributes:
        vocab_size: token ids that are text; summary rows of an embedding come on top.
        padded_vocab_size: rows of Megatron's embedding and output layer.
        seq_length: n, text tokens in a training sequence.
        rotary_base: the one base of all heads; unused where `bases` are given.
        rope_scaling_factor: factor of Llama 3's frequency scaling, or None.
        interpolation: positions are divided by it (linear scaling), or None.
        bases: HARPE bases, one for each KV group, or None.
        summary_coefficient: weight a of the summary projections on summary rows, 0 to 1.
        predicted_tokens: logits beyond are cut (truncate_predict_nums), 0 where none are, None: beyond vocab_size.
        spare_projections: the checkpoint has summary projections that the model does not use (a = 0).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    seq_length: int
    norm_epsilon: float
    rotary_base: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling_factor: float | None = None
    interpolation: int | None = None
    bases: tuple[float, ...] | None = None
    ksa: KSAConfig = field(default_factory=KSAConfig)
    summary_coefficient: float = 1.0
    spare_projections: bool = False
    predicted_tokens: int | None = None

    @property
    def layers(self) -> tuple[KSALayer, ...]:
        """Kind and window of every layer; without KSA all are full layers."""
        if not self.ksa.enabled:
            return (KSALayer(LayerKind.FULL, 0),) * self.num_layers
        return self.ksa.layers(self.num_layers, self.seq_length)

    @property
    def summary_rows(self) -> int:
        """S, rows of the summary embedding; 0 without KSA."""
        return self.ksa.rows.summary_tokens
