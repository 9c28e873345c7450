"""KSA self-attention: Megatron's self-attention with projections (and norms) of their own for summary rows."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import LinearQkvBuilder, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.attention_term import AttentionTerm
from megatron_ksa.model.rotated_attention import Heads, RotatedSelfAttention


@dataclass
class KSASelfAttentionSubmodules(SelfAttentionSubmodules):
    """Self-attention's submodules and those of the summary rows; None means shared with the text rows."""

    linear_qkv_summary: LinearQkvBuilder | None = None
    q_layernorm_summary: LayerNormBuilder | None = None
    k_layernorm_summary: LayerNormBuilder | None = None


class SharedNorm:
    """Lets a projection of Transformer Engine, which normalises its rows, do so with another projection's parameters.

    The parameters stay those of `source` alone: checkpoints, optimizer and data parallelism see them once.

    Args:
        linear: the projection that gives up its own parameters `layer_norm_*`; one without them is left as it is.
        source: the projection whose parameters it takes.
    """

    def __init__(self, linear: nn.Module, source: nn.Module) -> None:
        self.names = [name for name in linear._parameters if name.startswith("layer_norm_")]
        for name in self.names:
            del linear._parameters[name]
        self.give(linear, source)

    def give(self, linear: nn.Module, source: nn.Module) -> None:
        """Hand over the source's parameters before a forward pass: sharded data parallelism replaces them meanwhile."""
        for name in self.names:
            # A plain attribute is what the module's forward pass finds.
            linear.__dict__[name] = getattr(source, name)


def blend(text: Tensor, summary: Tensor, a: float | Tensor) -> Tensor:
    """a * summary + (1 - a) * text, rounded once.

    Args:
        text, summary: heads of the same rows by the text's and by the summary projection, of one shape and dtype.
        a: a number, or float32 [] on the device of both.
    """
    if isinstance(a, Tensor):
        # torch takes a weight of the rows' dtype only, to which a would be rounded.
        return torch.lerp(text.float(), summary.float(), a).to(summary.dtype)
    return torch.lerp(text, summary, a)


class KSASelfAttention(RotatedSelfAttention):
    """Self-attention over rows laid out `[text | summaries]` (KSA report, arXiv 2604.24432).

    Summary rows use q, k, v = a * summary projection + (1 - a) * text projection, mixed after the Q/K norm and before
    the rotation. `summary_coefficient` holds a; the trainer's annealing schedule sets it. Where the model is distilled,
    `term` compares the output with the teacher's.
    """

    term: AttentionTerm | None = None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: KSASelfAttentionSubmodules,
        layer_number: int,
        layout: RowLayout,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        self.layout = layout
        # A float, or float32 [] on the device where CUDA graphs read it.
        self.summary_coefficient: float | Tensor = 1.0
        self.linear_qkv_summary = None
        if submodules.linear_qkv_summary is not None:
            self.linear_qkv_summary = submodules.linear_qkv_summary(
                config.hidden_size,
                self.linear_qkv_out_dim,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=config.add_bias_linear or config.add_qkv_bias,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name="qkv",
                tp_group=self.pg_collection.tp,
                name=None if name is None else f"{name}.linear_qkv_summary",
            )
            self.shared_norm = SharedNorm(self.linear_qkv_summary, self.linear_qkv)
        self.q_layernorm_summary = self._head_norm(submodules.q_layernorm_summary)
        self.k_layernorm_summary = self._head_norm(submodules.k_layernorm_summary)

    def _head_norm(self, builder: LayerNormBuilder | None) -> nn.Module | None:
        if builder is None:
            return None
        return builder(
            hidden_size=self.hidden_size_per_attention_head, config=self.config, eps=self.config.layernorm_epsilon
        )

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Megatron's: attention output [rows of the shard, batch, hidden], and the bias to be added to it."""
        if self.linear_qkv_summary is not None:
            self.shared_norm.give(self.linear_qkv_summary, self.linear_qkv)
        output, bias = super().forward(hidden_states, *args, **kwargs)
        if self.term is not None:
            output = self.term(output, bias, self.layout.text_rows(output.shape[0]))
        return output, bias

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all rows, text rows first.

        Projecting text and summary rows apart gives the same order with sequence parallelism, where each rank's shard
        is laid out `[text | summaries]` and the projection gathers the shards.

        Args:
            hidden_states: [rows of the shard, batch, hidden].

        Returns:
            query [rows, batch, heads, head_dim], key and value [rows, batch, K/V heads, head_dim], heads of this
            tensor-parallel rank.
        """
        if not self.layout.summary_tokens:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        text, summaries = self.layout.split(hidden_states)
        if self._positions is not None:
            return self._project_and_rotate(text, summaries)
        text_qkv = self._project(self.linear_qkv, self.q_layernorm, self.k_layernorm, text)
        summary_qkv = self._project_summaries(summaries)
        query, key, value = (torch.cat(rows) for rows in zip(text_qkv, summary_qkv, strict=True))
        return query, key, value

    def _project_and_rotate(self, text: Tensor, summaries: Tensor) -> Heads:
        """`get_query_key_value_tensors` with the rotation; only a blend of projections is normalised before it."""
        norms = (self.q_layernorm, self.k_layernorm)
        if not self._fuses(*norms):
            text_heads = self._project(self.linear_qkv, *norms, text)
            return self._rotate([text_heads, self._project_summaries(summaries)], [None, None])
        text_heads = self._project_mixed(self.linear_qkv, text)
        if self._blends:
            return self._rotate([text_heads, self._project_summaries(summaries)], [norms, None])
        summary_heads = self._project_mixed(self._summary_projection, summaries)
        return self._rotate([text_heads, summary_heads], [norms, self._summary_norms])

    @property
    def _summary_projection(self) -> nn.Module:
        """What projects summary rows: their own projection, or the text's where they share it.

        Summary rows share the text's projection in a model without summary projections, and in evaluation once
        annealing has ended (a = 0). Training computes the summary projection at a = 0 too: data parallelism waits for
        its gradient, which is then zero.
        """
        a = self.summary_coefficient
        # A coefficient on the device is not looked at, which would wait for the device.
        annealed = not isinstance(a, Tensor) and a == 0.0 and not torch.is_grad_enabled()
        return self.linear_qkv if self.linear_qkv_summary is None or annealed else self.linear_qkv_summary

    @property
    def _blends(self) -> bool:
        """Whether summary rows mix their own projection with the text's."""
        a = self.summary_coefficient
        return self._summary_projection is not self.linear_qkv and (isinstance(a, Tensor) or a != 1.0)

    @property
    def _summary_norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        """Norms of the summary rows' queries and keys: their own, or the text's."""
        return self.q_layernorm_summary or self.q_layernorm, self.k_layernorm_summary or self.k_layernorm

    def _project_mixed(self, linear: nn.Module, rows: Tensor) -> Tensor | Heads:
        """Projected heads as they lie in memory (see `_rotate`), or apart where ranks share a group."""
        if self.world_size > self.config.num_query_groups:
            return self._project(linear, None, None, rows)
        mixed, _ = linear(rows)
        return mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))

    def _project_summaries(self, summaries: Tensor) -> Heads:
        heads = self._project(self._summary_projection, *self._summary_norms, summaries)
        if not self._blends:
            return heads
        text_heads = self._project(self.linear_qkv, self.q_layernorm, self.k_layernorm, summaries)
        return tuple(blend(t, s, self.summary_coefficient) for t, s in zip(text_heads, heads, strict=True))

    def _project(self, linear: nn.Module, q_norm: nn.Module | None, k_norm: nn.Module | None, rows: Tensor) -> Heads:
        """Project rows and split them into this rank's heads, as `SelfAttention.get_query_key_value_tensors` does."""
        mixed, _ = linear(rows)
        queries_per_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        ranks_per_group = self.world_size // self.config.num_query_groups
        rank = self.pg_collection.tp.rank()
        if ranks_per_group > 1:
            # Several ranks share one group: each has gathered the group's columns and keeps its own queries below.
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            mixed = mixed.chunk(self.config.num_query_groups, dim=-1)[rank // ranks_per_group]
        # [rows, batch, groups, (queries per group + 2) * head_dim]
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        dim = self.hidden_size_per_attention_head
        query, key, value = mixed.split([queries_per_group * dim, dim, dim], dim=-1)
        query = query.reshape(*query.shape[:2], self.num_query_groups_per_partition * queries_per_group, dim)
        if ranks_per_group > 1:
            query = query.chunk(ranks_per_group, dim=2)[rank % ranks_per_group]
        if q_norm is not None:
            query = q_norm(query)
        if k_norm is not None:
            key = k_norm(key)
        return query, key, value
