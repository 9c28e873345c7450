"""What a decoder layer keeps for its backward pass, and what that pass takes beside it, in bytes of one micro-batch."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_ksa.config.ksa import KSALayer, LayerKind
from megatron_ksa.config.recompute import Recompute
from megatron_ksa.context_parallel.plan import HaloPlan, route, sees_summaries
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.zigzag import ZigZag


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of the tensors of one layer, by the module that saves them.

    Attributes:
        stream: the layer's input, all rows: what the first norm saves and the residual connection adds.
        norms: outputs of both norms, which the projections behind them save.
        statistics: what the norms save beside their input.
        projected: what Q/K norm and rotation save.
        heads: queries, keys and values after norm and rotation, which attention saves.
        heads_again: of `heads`, what can be computed again from what the rotation saves.
        core: what attention saves beside `heads` and its result.
        context: what attention saves in addition under context parallelism.
        output: attention's result, which the output projection saves.
        middle: the rows between attention and MLP.
        mlp: what the MLP's activation saves.
        activation: the activation's result, which the second projection saves.
        mlp_working: what the MLP's backward pass adds at its fullest, when the gradients of the activation's input and
            result are there; the result's gradient counts in the place of the result, which is gone.
        attention_working: what attention's backward pass adds at its fullest, when the MLP's tensors are gone.
    """

    stream: int
    norms: int
    statistics: int
    projected: int
    heads: int
    heads_again: int
    core: int
    context: int
    output: int
    middle: int
    mlp: int
    activation: int
    mlp_working: int
    attention_working: int

    @property
    def whole(self) -> int:
        """Everything that the layer saves."""
        return (
            self.stream + self.norms + self.statistics + self.projected + self.heads + self.core + self.context
            + self.output + self.middle + self.mlp + self.activation
        )  # fmt: skip

    def again(self, recompute: Recompute) -> dict[str, int]:
        """What a layer that is not recomputed whole computes again instead of keeping it."""
        every = {
            "core_attn": self.core + self.context, "layernorm": self.norms + self.statistics,
            "mlp": self.mlp + self.activation, "norms": self.norms, "heads": self.heads_again,
            "activation": self.activation,
        }  # fmt: skip
        return {name: every[name] for name in (*recompute.modules, *recompute.cheap)}

    def kept(self, recompute: Recompute) -> int:
        """What stays after the forward pass of a layer that is not recomputed whole."""
        return self.whole - sum(self.again(recompute).values())

    def fullest(self, recompute: Recompute) -> int:
        """What is there at the fullest moment of the layer's backward pass.

        When the gradients around the MLP's activation are there, norms and heads are not computed again yet, but a
        recomputed MLP is, whose result exists a second time. In attention's backward pass the MLP's tensors are gone.
        """
        missing = {name: size for name, size in self.again(recompute).items() if name not in ("mlp", "activation")}
        at_mlp = self.whole - sum(missing.values()) + self.mlp_working
        if "mlp" in recompute.modules:
            # The input of the recomputed MLP is there again as well.
            at_mlp += self.middle + (self.norms // 2 if missing.keys() & {"norms", "layernorm"} else 0)
        norms = sum(size for name, size in missing.items() if name in ("norms", "layernorm"))
        # The second norm's output, which the MLP has saved, is gone too.
        norms = norms or max(self.norms - self.middle, 0)
        at_attention = self.whole - self.mlp - self.activation - norms + self.attention_working
        return max(at_mlp, at_attention)


@lru_cache(4096)
def layer_memory(shape: ModelShape, layer: KSALayer, layout: TrainingLayout, comm: str = "p2p") -> LayerMemory:
    """Memory of one layer on one rank for one micro-batch, whatever `layout.recompute` says.

    Args:
        comm: the layer's kind of context parallelism, p2p or a2a.
    """
    size, tp, shards = layout.parameter_bytes, layout.tensor_parallel, layout.row_shards
    text = layout.rank_text
    all_rows = shape.ksa.rows.total_rows(text)
    # Full and window layers hold text rows alone.
    rows = all_rows if layer.has_summaries else text
    states = size * rows * shape.hidden // shards
    query, kv, ffn = (size * rows * width // tp for width in (shape.query, shape.kv, shape.ffn))
    core, context, context_working = _attention(shape, layer, layout, rows, comm)
    projected, heads = _heads(shape, layer, layout, query, kv, rows)
    # A frozen projection does not save its input: of the norms' outputs the summary projection's is kept, attention's
    # result where attention itself saves it, the activation's not at all.
    frozen = layout.train == "summary"
    joined = layer.has_summaries and core >= size * text * shape.query // tp
    stream = size * all_rows * shape.hidden // shards
    return LayerMemory(
        stream=stream,
        norms=(layer.has_summaries if frozen else 2) * states,
        statistics=(0 if layout.fused_norm else 2 * states) + 2 * 4 * rows * shape.norm_vectors // shards,
        projected=projected,
        heads=heads,
        heads_again=heads if layout.fused_rotation and shape.qk_norm else 0,
        core=core,
        context=context,
        output=0 if frozen and joined else query,
        middle=states,
        mlp=ffn * ((2 if layout.fused_swiglu else 4) if shape.gated else 1),
        activation=0 if frozen else ffn,
        # The gradient of the activation's input, and the stream's.
        mlp_working=ffn * ((2 if shape.gated else 1) + frozen) + stream,
        # Gradients of the stream, of attention's result, and of queries, keys and values.
        attention_working=stream + 2 * query + 2 * kv + context_working,
    )


def _heads(
    shape: ModelShape, layer: KSALayer, layout: TrainingLayout, query: int, kv: int, rows: int
) -> tuple[int, int]:
    """Bytes that Q/K norm and rotation save, and bytes of their results.

    Args:
        query, kv: bytes of the queries and of the keys of `rows` rows.
    """
    size, tp = layout.parameter_bytes, layout.tensor_parallel
    if layout.fused_rotation:
        # The projection, where the kernel normalises as well; it writes queries, keys and values anew.
        return (query + 2 * kv if shape.qk_norm else 0), query + 2 * kv
    # Joined with those of summaries the values are copied; text rows alone take them from the projection's output,
    # which the norm of its keys keeps as a whole.
    heads = query + kv + (kv if layer.has_summaries else 0)
    # Cosines and sines, for queries and for keys; the same for every sample.
    saved = (2 * (query + kv) if shape.angles_per_head else 4 * size * rows * shape.head_dim) // layout.micro_batch
    if shape.qk_norm:
        # The projection, whose heads are normalised where they lie, but for queries that share a key, which are copied.
        copied = query if shape.heads > shape.kv_heads else 0
        saved += query + 2 * kv + copied + 4 * rows * shape.norm_vectors * (shape.heads + shape.kv_heads) // tp
        return saved + (0 if layout.fused_norm else query + kv), heads
    return (saved if layer.has_summaries else saved + query + 2 * kv), heads


def _attention(
    shape: ModelShape, layer: KSALayer, layout: TrainingLayout, rows: int, comm: str
) -> tuple[int, int, int]:
    """`LayerMemory.core`, `LayerMemory.context`, and what context parallelism adds in the backward pass, in bytes."""
    size, text = layout.parameter_bytes, layout.rank_text
    heads, row = shape.heads // layout.tensor_parallel, size * shape.query // layout.tensor_parallel
    core = 4 * text * heads
    if layout.context_parallel > 1 and comm == "p2p":
        return core, *_exchanged(shape, layer, layout)
    if layer.has_summaries and not layout.fused_attention:
        core += _gathered_for_summaries(shape, layout, rows, text)
    if layer.has_summaries:
        sees_all = layer.window_chunks * shape.ksa.chunk_size >= layout.text_length and not layout.resets_documents
        if not layout.fused_attention or sees_all:
            # Text and summary queries attend apart, and their results are joined.
            core += row * text
    # An all-to-all gives every rank all rows of some heads, and takes the result back into the rank's rows.
    return core, row * rows if layout.context_parallel > 1 else 0, 0


def _gathered_for_summaries(shape: ModelShape, layout: TrainingLayout, rows: int, text: int) -> int:
    """What summary queries save in plain PyTorch: each head's keys and values, queries, probabilities, and the mask."""
    ksa, size, tp = shape.ksa, max(layout.parameter_bytes, 4), layout.tensor_parallel
    summaries, keys = rows - text, ksa.chunk_size + ksa.summary_tokens
    heads = size * (2 * rows + summaries) * shape.query // tp
    return heads + summaries * keys * (size * shape.heads // tp) + summaries * keys // layout.micro_batch


def _exchanged(shape: ModelShape, layer: KSALayer, layout: TrainingLayout) -> tuple[int, int]:
    """Bytes that attention saves of other ranks' keys, of the rank with the most, and what its backward pass takes
    beyond that, of the rank with the most of both.
    """
    tp, text, ksa = layout.tensor_parallel, layout.text_length, shape.ksa
    geometry = KSAGeometry(ksa.chunk_size, ksa.summary_tokens * layer.has_summaries, layer.window_chunks)
    if layer.kind == LayerKind.FULL:
        geometry = KSAGeometry(1, 0, text)
    summaries = ksa.rows.summary_rows(text) if sees_summaries(geometry, text) else 0
    ranks = [ZigZag(rank, layout.context_parallel) for rank in range(layout.context_parallel)]
    every = [_of_rank(HaloPlan.of(geometry, text, rank), summaries) for rank in ranks]
    row = layout.micro_batch * layout.parameter_bytes * shape.head_dim
    key, query = 2 * max(shape.kv_heads // tp, 1) * row, shape.heads // tp * row
    saved = max(kept for kept, _, _ in every) * key
    return saved, max((kept + keys) * key + queries * query for kept, keys, queries in every) - saved


def _of_rank(plan: HaloPlan, summaries: int) -> tuple[int, int, int]:
    """Rows of keys that a rank keeps of others; rows of gradients of keys, and of queries, at the fullest moment of the
    backward pass.

    Args:
        summaries: of the whole sequence, 0 where no query sees one.
    """
    way, rank, segments = route(plan), plan.split.rank, plan.split.segments()
    kept = sum(map(len, plan.needed(rank))) if way.joined else plan.rows_received(rank)
    # Gradients of joined halos are sorted into what goes back; those of own rows wait to be added.
    halos = kept + (plan.rows_received(rank) if way.joined else 0)
    halos += sum(where.rows.stop - where.rows.start for where in way.places if where is not None and where.own)
    # Those of summaries, and zeros for a segment that nobody sees, are joined in the order of ranks; then gradients of
    # this rank's rows arrive.
    of_segment = summaries // (2 * plan.split.size)
    before, arriving = of_segment * segments[1], plan.rows_sent(rank) + 2 * of_segment
    far = sum(plan.segment_rows if summaries and segment else len(plan.head(segment)) for segment in segments)
    return kept + before, halos + summaries + max(before + of_segment, arriving), far
