"""Megatron's self-attention whose query and key heads are normalised and rotated by this project's kernel."""

from collections.abc import Callable
from functools import partial

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_ksa.kernels.rotation import mix, rotate_heads
from megatron_ksa.model.norm import Norm
from megatron_ksa.rotary.embedding import PositionedRotaryEmbedding

Heads = tuple[Tensor, Tensor, Tensor]


class RotatedSelfAttention(SelfAttention):
    """Self-attention that also takes integer positions as rotary_pos_emb: a tensor, as recompute and CUDA graphs ask.

    They are kept from Megatron's forward pass, which knows angles only, and heads are rotated as soon as they are
    projected, together with their norm where it is an RMS norm of this project. Angles go Megatron's way.
    """

    _rotary: tuple[PositionedRotaryEmbedding] | None = None
    _positions: Tensor | None = None
    # Where rotated heads are computed again in place of being saved: a weak reference to `SavedAgain.offer`.
    offer: Callable[[], Callable] | None = None

    def set_rotary(self, rotary: PositionedRotaryEmbedding) -> None:
        """Rotate by these frequencies; they stay the model's, of which this is no submodule."""
        self._rotary = (rotary,)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args, rotary_pos_emb=None, **kwargs):
        """Megatron's; rotary_pos_emb is int64 positions [rows, batch or 1], or angles as Megatron takes them."""
        if not isinstance(rotary_pos_emb, Tensor) or rotary_pos_emb.is_floating_point():
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        without = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        self._positions = None if without else rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._positions = None

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
        rotate = partial(
            rotate_heads, queries=queries, weights=weights, positions=self._positions,
            frequencies=self._rotary[0].frequencies(self._positions.device), eps=config.layernorm_epsilon,
            zero_centered=config.layernorm_zero_centered_gamma, interleaved=config.rotary_interleaved,
        )  # fmt: skip
        heads = rotate(mixed)
        if self.offer is not None and all(pairs):
            self.offer()(heads, partial(rotate, [part.detach() for part in mixed]))
        return heads

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's; heads come normalised and rotated where `forward` was given positions."""
        if self._positions is None:
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
