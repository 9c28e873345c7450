"""Megatron's self-attention whose query and key heads are normalised and rotated by this project's kernel."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_ksa.kernels.rotation import mix, rotate_heads
from megatron_ksa.model.norm import Norm

Heads = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def is_fixed_point(rotary_pos_emb: Pair) -> bool:
    """Whether the pair is that of `PositionedRotaryEmbedding.fixed_point` and not one of angles."""
    return not rotary_pos_emb[0].is_floating_point()


class RotatedSelfAttention(SelfAttention):
    """Self-attention that also takes integer positions and frequencies as rotary_pos_emb.

    Those are kept from Megatron's forward pass, which knows angles only, and heads are rotated as soon as they are
    projected, together with their norm where it is an RMS norm of this project. Angles go Megatron's way.
    """

    _rotation: Pair | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args, rotary_pos_emb=None, **kwargs):
        """Megatron's; rotary_pos_emb as `PositionedRotaryEmbedding` returns it."""
        if not isinstance(rotary_pos_emb, tuple) or not is_fixed_point(rotary_pos_emb):
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        without = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        self._rotation = None if without else rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._rotation = None

    def _fuses(self, *norms: nn.Module | None) -> bool:
        """Whether the kernel does the norms too, or there are none; others run before it."""
        return all(norm is None or (isinstance(norm, Norm) and norm.is_rms) for norm in norms)

    def _rotate(self, parts: list[Tensor | Heads], norms: list[tuple[Norm, Norm] | None]) -> Heads:
        """Rotate the heads of consecutive parts of the rows and join the parts.

        Args:
            parts: each part as projected, [rows, batch, K/V heads, (queries per group + 2) * head_dim], or its query,
                key and value, [rows, batch, heads, head_dim].
            norms: of queries and keys of each part, of None, or None where they are normalised already.
        """
        config = self.config
        mixed = [part if isinstance(part, Tensor) else mix(*part) for part in parts]
        queries = mixed[0].shape[-1] // self.hidden_size_per_attention_head - 2
        pairs = [None if pair is None or pair[0] is None else pair for pair in norms]
        weights = [None if pair is None else tuple(norm(None) for norm in pair) for pair in pairs]
        return rotate_heads(
            mixed, queries, weights, *self._rotation, eps=config.layernorm_epsilon,
            zero_centered=config.layernorm_zero_centered_gamma, interleaved=config.rotary_interleaved,
        )  # fmt: skip

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's; heads come normalised and rotated where `forward` was given positions and frequencies."""
        if self._rotation is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        norms = (self.q_layernorm, self.k_layernorm)
        fused = self._fuses(*norms)
        if fused and self.config.num_query_groups >= self.world_size:
            mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
            return self._rotate([mixed], [norms])
        if fused:
            self.q_layernorm = self.k_layernorm = None
        try:
            heads = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        finally:
            self.q_layernorm, self.k_layernorm = norms
        return self._rotate([heads], [norms if fused else None])
