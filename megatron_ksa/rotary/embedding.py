"""Rotary angles for explicit positions, with one base for each KV group (HARPE, arXiv 2412.07171)."""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ksa.kernels.rotation import fixed_point


class PositionedRotaryEmbedding(nn.Module):
    """Angles theta[h, i] * m of RoPE at given positions m, theta[h, i] = b_h^(-2 i / d_rot), i = 0 .. d_rot/2 - 1.

    A query head is rotated by the base of its KV group, so that it agrees with the keys it meets. With one base the
    angles are those of Megatron's `RotaryEmbedding`, bit for bit. Angles are formed in float32.

    Args:
        bases: one base for all heads, or one for each KV group of the whole model.
        rotary_dim: d_rot, rotated leading channels of a head (`--rotary-percent`); even.
        num_heads: query heads of the whole model.
        interleaved: rotate neighbouring channels (`--rotary-interleaved`) instead of halves.
        seq_len_interpolation_factor: positions are divided by it, or None.
        tp_rank, tp_size: tensor-parallel rank and size; only this rank's heads get angles.
        device: where the inverse frequencies live.
    """

    def __init__(
        self,
        bases: tuple[float, ...],
        rotary_dim: int,
        num_heads: int,
        *,
        interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.bases = tuple(bases)
        self.interleaved = interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        groups = len(self.bases)
        # Megatron's formula for its one base, for each base, so that equal bases give equal bits.
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        inv_freq = torch.stack([1.0 / (base**exponents) for base in self.bases])
        exact = torch.tensor(self.bases, dtype=torch.float64, device=device)[:, None] ** -(
            torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        )
        if groups > 1:
            heads = torch.arange(groups, device=device)
            self.groups_per_rank = max(groups // tp_size, 1)
            first = tp_rank * groups // tp_size
            own = heads[first : first + self.groups_per_rank]
            inv_freq, exact = inv_freq[own], exact[own]
        # float32 [K/V groups of this rank or 1, d_rot / 2]; no buffer, which --bf16 would cast with the parameters.
        self.inv_freq = inv_freq
        self._exact_inv_freq = exact
        self._frequencies: Tensor | None = None
        self.queries_per_group = num_heads // tp_size // inv_freq.shape[0] if groups > 1 else 1

    @classmethod
    def build(
        cls,
        config: TransformerConfig,
        *,
        bases: tuple[float, ...],
        rotary_percent: float,
        seq_len_interpolation_factor: float | None,
        tp_group: torch.distributed.ProcessGroup,
    ) -> "PositionedRotaryEmbedding":
        """The embedding of a Megatron model, on its device."""
        return cls(
            bases,
            int(config.kv_channels * rotary_percent),
            config.num_attention_heads,
            interleaved=config.rotary_interleaved,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            tp_rank=tp_group.rank(),
            tp_size=tp_group.size(),
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )

    def rescale(self, scale: Callable[[Tensor], Tensor]) -> None:
        """Replace the inverse frequencies by a function of them (Llama 3's scaling)."""
        self.inv_freq, self._exact_inv_freq = scale(self.inv_freq), scale(self._exact_inv_freq)
        self._frequencies = None

    def frequencies(self, device: torch.device) -> Tensor:
        """What `rotate_heads` forms this rank's angles from, exactly.

        Returns:
            int64 [K/V heads of this rank or 1, d_rot / 2], in units of 2^-64 turn.
        """
        if self._frequencies is None or self._frequencies.device != device:
            exact = self._exact_inv_freq / (self.seq_len_interpolation_factor or 1.0)
            self._frequencies = fixed_point(exact).to(device)
        return self._frequencies

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of this rank's query heads and K/V heads.

        Args:
            positions: int [rows, batch or 1].

        Returns:
            float32 [rows, batch or 1, query heads or 1, d_rot] and [rows, batch or 1, K/V heads or 1, d_rot], the pair
            that Megatron's `SelfAttention` takes as `rotary_pos_emb`.
        """
        self.inv_freq = self.inv_freq.to(positions.device)
        positions = positions.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            positions = positions * (1 / self.seq_len_interpolation_factor)
        # [rows, batch, groups, d_rot / 2]
        angles = positions[..., None, None] * self.inv_freq
        angles = torch.stack([angles, angles], dim=-1).flatten(-2) if self.interleaved else torch.cat([angles] * 2, -1)
        return angles.repeat_interleave(self.queries_per_group, dim=2), angles
