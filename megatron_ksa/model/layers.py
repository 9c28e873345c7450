"""Modules of a decoder layer: those that treat text and summary rows differently, and the sum with the residual."""

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.norm_of_linear import DecoderLayer


def residual_sum(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Megatron's `get_bias_dropout_add`, without torch.compile where there is nothing but the sum.

    torch.compile makes one kernel of the sum too, but a call of it costs the host as much as several launches.
    """
    megatrons = get_bias_dropout_add(training, fused)

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        x, bias = x_with_bias
        if bias is not None or (training and prob) or x.dtype != residual.dtype or not fuses("residual"):
            return megatrons(x_with_bias, residual, prob)
        return residual + x

    return add


class BypassTransformerLayer(DecoderLayer):
    """A full-attention or window layer of a hybrid model: text rows pass through it, summary rows skip it."""

    def __init__(self, *args, layout: RowLayout, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.layout = layout

    def forward(self, hidden_states: Tensor, *args, rotary_pos_emb=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Megatron's layer on the text rows.

        Args:
            hidden_states: [rows of the shard, batch, hidden], laid out `[text | summaries]`.
            rotary_pos_emb: [rows, ...] positions of all rows of the sequence, a pair of their angles, or None.

        Returns:
            [rows of the shard, batch, hidden], the summary rows unchanged, and the layer's context.
        """
        text, summaries = self.layout.split(hidden_states)
        if isinstance(rotary_pos_emb, Tensor):
            rotary_pos_emb, _ = self.layout.split(rotary_pos_emb)
        elif rotary_pos_emb is not None:
            rotary_pos_emb = tuple(self.layout.split(angles)[0] for angles in rotary_pos_emb)
        text, context = super().forward(text, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        return torch.cat([text, summaries]), context


class SplitLayerNorm(MegatronModule):
    """Layer norm with weights of its own for the summary rows (`--ksa-independent-layernorm`)."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, norm: LayerNormBuilder, layout: RowLayout
    ) -> None:
        super().__init__(config=config)
        self.layout = layout
        self.text = norm(config=config, hidden_size=hidden_size, eps=eps)
        self.summary = norm(config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[rows of the shard, batch, hidden] -> the same shape."""
        text, summaries = self.layout.split(hidden_states)
        return torch.cat([self.text(text), self.summary(summaries)])


class SummaryEmbedding(MegatronModule):
    """The learned summary tokens: appends their rows to the embedded text (KSA report, arXiv 2604.24432)."""

    def __init__(self, config: TransformerConfig, layout: RowLayout) -> None:
        super().__init__(config=config)
        self.layout = layout
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(layout.summary_tokens, config.hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        config.embedding_init_method(self.weight)
        # With sequence parallelism each rank grows its own shard and holds a part of the gradient.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, text: Tensor) -> Tensor:
        """[text rows of the shard, batch, hidden] -> [rows of the shard, batch, hidden]."""
        return self.layout.grow(text, self.weight)
