"""Which tensors of a Megatron checkpoint are which tensors of a Hugging Face checkpoint.

Every correspondence is one of rows: the Hugging Face tensors of a group, one below the other, are the Megatron tensors
of the group, one below the other, but for the order of `linear_qkv`'s rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.checkpoint.streaming import Slot
from megatron_ksa.config.ksa import KSALayer
from megatron_ksa.huggingface.architecture import Architecture

# Tensors that a released checkpoint has and the model does not use are kept in the Megatron checkpoint under this
# prefix, which the trainer passes over: the way back then gives the released bytes.
UNUSED = "huggingface."


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together.

    Attributes:
        megatron: parts of the distributed checkpoint, by row.
        huggingface: names and shapes, by row.
        query_groups: for Q, K and V: the number of KV groups, whose query, key and value rows Megatron keeps together.
    """

    megatron: tuple[Slot, ...]
    huggingface: dict[str, tuple[int, ...]]
    query_groups: int | None = None

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Hugging Face tensors, in the order of `huggingface`, as the tensors of `megatron`."""
        if self.query_groups is not None:
            parts = [tensor.unflatten(0, (self.query_groups, -1)) for tensor in tensors]
            tensors = [torch.cat(parts, dim=1).flatten(0, 1)]
        return _regroup(tensors, [slot.tensor_shape[0] for slot in self.megatron])

    def to_huggingface(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `to_megatron`."""
        rows = [shape[0] for shape in self.huggingface.values()]
        if self.query_groups is None:
            return _regroup(tensors, rows)
        grouped = tensors[0].unflatten(0, (self.query_groups, -1))
        parts = grouped.split([count // self.query_groups for count in rows], dim=1)
        return [part.flatten(0, 1) for part in parts]


def _regroup(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """The same rows, divided otherwise."""
    if [tensor.shape[0] for tensor in tensors] == list(rows):
        return list(tensors)
    whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    return list(whole.split(list(rows)))


def groups(arch: Architecture) -> Iterator[Group]:
    """All groups of a model, in the order in which checkpoints are written: embedding, layers, head."""
    yield _vocabulary(arch, "embedding.word_embeddings.weight", "summary_embedding.weight", "model.embed_tokens.weight")
    for index, layer in enumerate(arch.layers):
        yield from _layer_groups(arch, index, layer)
    norm = Slot.whole("decoder.final_layernorm.weight", (arch.hidden_size,))
    yield Group((norm,), {"model.norm.weight": (arch.hidden_size,)})
    if not arch.tied:
        yield _vocabulary(arch, "output_layer.weight", f"{UNUSED}lm_head.weight", "lm_head.weight")


def _vocabulary(arch: Architecture, text: str, summaries: str, name: str) -> Group:
    """Rows of text tokens, then those of the summary tokens."""
    parts = [Slot(text, (arch.padded_vocab_size, arch.hidden_size), (0, 0), (arch.vocab_size, arch.hidden_size))]
    if arch.summary_rows:
        parts.append(Slot.whole(summaries, (arch.summary_rows, arch.hidden_size)))
    return Group(tuple(parts), {name: (arch.vocab_size + arch.summary_rows, arch.hidden_size)})


def _layer_groups(arch: Architecture, index: int, layer: KSALayer) -> Iterator[Group]:
    hidden, ffn, dim = arch.hidden_size, arch.ffn_hidden_size, arch.head_dim
    theirs = f"model.layers.{index}"
    is_ksa = layer.has_summaries

    def slot(name: str, shape: tuple[int, ...], prefix: str = "") -> Slot:
        # Layers of a KSA model differ in their parameters, so Megatron does not stack them.
        if arch.ksa.enabled:
            return Slot.whole(f"{prefix}decoder.layers.{index}.{name}", shape)
        return Slot.stacked(f"{prefix}decoder.layers.{name}", shape, index, arch.num_layers)

    def same(ours: str, name: str, shape: tuple[int, ...]) -> Group:
        return Group((slot(ours, shape),), {f"{theirs}.{name}": shape})

    def qkv(suffix: str, kind: str, width: tuple[int, ...], prefix: str = "") -> Group:
        rows = {"q": arch.num_heads * dim, "k": arch.num_query_groups * dim, "v": arch.num_query_groups * dim}
        name = f"self_attention.linear_qkv{suffix}.{kind}"
        parts = {f"{theirs}.self_attn.{part}_proj{suffix}.{kind}": (count, *width) for part, count in rows.items()}
        return Group((slot(name, (sum(rows.values()), *width), prefix),), parts, arch.num_query_groups)

    split_norm = is_ksa and arch.ksa.independent_layernorm
    norm = "self_attention.linear_qkv.layer_norm_"
    yield same(f"{norm}text.weight" if split_norm else f"{norm}weight", "input_layernorm.weight", (hidden,))
    if split_norm:
        yield same(f"{norm}summary.weight", "input_layernorm_summary.weight", (hidden,))
    own = is_ksa and arch.ksa.independent_projections
    for suffix in ("", "_summary") if own or (is_ksa and arch.spare_projections) else ("",):
        prefix = UNUSED if suffix and not own else ""
        yield qkv(suffix, "weight", (hidden,), prefix)
        if arch.qkv_bias:
            yield qkv(suffix, "bias", (), prefix)
    if arch.qk_norm:
        for suffix in ("", "_summary") if is_ksa and arch.ksa.independent_qk_norm else ("",):
            for part in "qk":
                yield same(
                    f"self_attention.{part}_layernorm{suffix}.weight", f"self_attn.{part}_norm{suffix}.weight", (dim,)
                )
    yield same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, arch.num_heads * dim))
    yield same("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", (hidden,))
    yield Group(
        (slot("mlp.linear_fc1.weight", (2 * ffn, hidden)),),
        {f"{theirs}.mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")},
    )
    yield same("mlp.linear_fc2.weight", "mlp.down_proj.weight", (hidden, ffn))


def empty_objects(arch: Architecture) -> Iterator[tuple[str, int, int]]:
    """Key, index and count of the `_extra_state` objects that Megatron asks for; all are empty here.

    Its local layers want them of every linear layer; Transformer Engine's of norms and core attention too, and a
    checkpoint without them is refused unless `--dist-ckpt-strictness` says otherwise.
    """
    for index, layer in enumerate(arch.layers):
        for name in _with_extra_state(arch, layer):
            if arch.ksa.enabled:
                yield f"decoder.layers.{index}.{name}_extra_state", 0, 1
            else:
                yield f"decoder.layers.{name}_extra_state", index, arch.num_layers
    yield "decoder.final_layernorm._extra_state", 0, 1


def _with_extra_state(arch: Architecture, layer: KSALayer) -> Iterator[str]:
    """Prefixes of a layer's `_extra_state` objects."""
    is_ksa = layer.has_summaries
    yield from ("self_attention.linear_proj.", "self_attention.linear_qkv.", "mlp.linear_fc1.", "mlp.linear_fc2.")
    if is_ksa and arch.ksa.independent_projections:
        yield "self_attention.linear_qkv_summary."
    yield "self_attention.core_attention."
    # The input norm's, under the name that the layer's key map gives it.
    parts = ("text.", "summary.") if is_ksa and arch.ksa.independent_layernorm else ("",)
    yield from (f"self_attention.linear_qkv.layer_norm_{part}" for part in parts)
    if arch.qk_norm:
        suffixes = ("", "_summary") if is_ksa and arch.ksa.independent_qk_norm else ("",)
        yield from (f"self_attention.{part}_layernorm{suffix}." for suffix in suffixes for part in "qk")
