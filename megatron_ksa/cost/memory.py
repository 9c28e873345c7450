"""What a KSA model takes of a GPU's memory, from its shape and the parallel layout; pure functions, no Megatron.

Counted are parameters, gradient buffers, optimizer state, the tensors that autograd saves and the logits. Not counted:
communication buffers, the allocator's fragments and the CUDA context, which are a few GB on a GPU. Experts (MoE) and
multi-token prediction are not described here.
"""

import dataclasses
from dataclasses import dataclass

from megatron_ksa.config.ksa import KSAConfig, KSALayer, LayerKind
from megatron_ksa.config.loss import LossConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        ksa: KSA settings; with `ksa.enabled` off every layer is full attention.
        vocabulary: padded words.
        gated: the MLP has a gate (SwiGLU).
        tied: the output layer's weight is the embedding's.
        norm_vectors: parameter vectors of a norm, 1 for RMSNorm and 2 for LayerNorm.
        angles_per_head: rotary angles differ between heads (HARPE).
    """

    ksa: KSAConfig
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    bias: bool = False
    qkv_bias: bool = False
    norm_vectors: int = 1
    angles_per_head: bool = False

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of all heads; the values' too."""
        return self.kv_heads * self.head_dim

    def layers(self, text_length: int) -> tuple[KSALayer, ...]:
        """Kind and window of every layer."""
        if self.ksa.enabled:
            return self.ksa.layers(self.num_layers, text_length)
        return (KSALayer(LayerKind.FULL, 0),) * self.num_layers


@dataclass(frozen=True)
class TrainingLayout:
    """How a model is trained: parallel sizes, batch, precision, recompute.

    Attributes:
        text_length: n, text tokens in a sequence.
        micro_batch: sequences in a micro-batch; `num_micro_batches` of them in a step of one data-parallel rank.
        virtual_stages: model chunks of a pipeline rank (interleaved schedule), 1 without.
        parameter_bytes: 2 for bfloat16 and float16, 4 for float32.
        gradient_bytes: of an element of the gradient buffers, 4 unless gradients are reduced in 16 bits.
        recompute: none, selective (core attention) or full (every layer).
        recompute_layers: layers of a recomputed unit (`--recompute-num-layers` of the uniform method).
        fused_norm: the norm saves its input only, as torch's does on a GPU; otherwise also its normalised rows.
        fused_swiglu: the gated activation saves its input only (`--bias-swiglu-fusion`).
        fused_attention: KSA attention runs in its kernels; in plain PyTorch summary queries gather their keys.
        fused_rotation: Q/K norm and rotation run in one kernel that saves the projected heads only.
        fused_gradient: the output layer's gradient goes straight to the buffer (gradient accumulation fusion).
        train: `summary` where all but the summary parameters are frozen. The activations are then an upper bound: what
            autograd saves for gradients of weights alone is not saved.
        distills: a teacher's outputs are compared with the student's.
        teacher_on_host: these outputs wait in host memory (`--ksa-distill-offload`).
    """

    text_length: int
    micro_batch: int = 1
    num_micro_batches: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    virtual_stages: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    parameter_bytes: int = 2
    gradient_bytes: int = 4
    recompute: str = "none"
    recompute_layers: int = 1
    loss: LossConfig = LossConfig()
    fused_norm: bool = True
    fused_swiglu: bool = True
    fused_attention: bool = True
    fused_rotation: bool = False
    fused_gradient: bool = False
    train: str = "all"
    distills: bool = False
    teacher_on_host: bool = False

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {self.recompute!r}: use one of {', '.join(RECOMPUTE)}")

    @property
    def rank_text(self) -> int:
        """Text tokens of a micro-batch on one rank, before sequence parallelism divides them."""
        return self.text_length * self.micro_batch // self.context_parallel

    @property
    def row_shards(self) -> int:
        """Ranks among which rows outside attention and MLP are divided."""
        return self.tensor_parallel if self.sequence_parallel else 1


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on one GPU of a pipeline stage, and the parameters there (a number)."""

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def layer_parameters(shape: ModelShape, layer: KSALayer, tensor_parallel: int = 1) -> int:
    """Parameters of a decoder layer on one tensor-parallel rank."""
    ksa, attends = shape.ksa, layer.has_summaries
    qkv_width = shape.query + 2 * shape.kv
    qkv = qkv_width * (shape.hidden + (shape.bias or shape.qkv_bias))
    projections = qkv * (2 if attends and ksa.independent_projections else 1)
    fc1 = shape.ffn * (2 if shape.gated else 1)
    divided = projections + shape.query * shape.hidden + fc1 * (shape.hidden + shape.bias) + shape.ffn * shape.hidden
    norms = 2 + (attends and ksa.independent_layernorm)
    head_norms = 2 * (1 + (attends and ksa.independent_qk_norm)) if shape.qk_norm else 0
    whole = shape.norm_vectors * (norms * shape.hidden + head_norms * shape.head_dim) + 2 * shape.bias * shape.hidden
    return divided // tensor_parallel + whole


def stage_layers(shape: ModelShape, layout: TrainingLayout, stage: int) -> list[KSALayer]:
    """The layers of a pipeline stage where Megatron divides them evenly, all its model chunks together."""
    layers = shape.layers(layout.text_length)
    stages = layout.pipeline_parallel
    each = len(layers) // (stages * layout.virtual_stages)
    begins = (each * (stages * chunk + stage) for chunk in range(layout.virtual_stages))
    return [layer for begin in begins for layer in layers[begin : begin + each]]


def stage_parameters(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """Parameters of one tensor-parallel rank of a pipeline stage."""
    tp, last = layout.tensor_parallel, layout.pipeline_parallel - 1
    total = sum(layer_parameters(shape, layer, tp) for layer in stage_layers(shape, layout, stage))
    words = shape.vocabulary * shape.hidden // tp
    if stage == 0:
        total += words + shape.ksa.rows.summary_tokens * shape.hidden
    if stage == last:
        total += shape.norm_vectors * shape.hidden
        total += words if not shape.tied or last > 0 else 0
    return total


def trained_parameters(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """Those of `stage_parameters` that have gradients and optimizer state."""
    every = stage_parameters(shape, layout, stage)
    if layout.train == "all":
        return every
    shared = dataclasses.replace(
        shape.ksa, independent_projections=False, independent_qk_norm=False, independent_layernorm=False,
        anneal_start=None, anneal_end=None,
    )  # fmt: skip
    embedding = shape.ksa.rows.summary_tokens * shape.hidden if stage == 0 else 0
    return every - stage_parameters(dataclasses.replace(shape, ksa=shared), layout, stage) + embedding


def teacher_bytes(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """What a stage keeps of the teacher: its final states, and of each KSA layer the term's gradient or its output.

    With full recompute and `teacher_on_host` one layer's output and its copy are on the GPU at a time.
    """
    if not layout.distills:
        return 0
    layers = sum(layer.has_summaries for layer in stage_layers(shape, layout, stage))
    if layout.teacher_on_host and layout.recompute == "full":
        layers = min(layers, 2)
    rows = layout.parameter_bytes * layout.rank_text * shape.hidden // layout.row_shards
    return int((layers + 1) * rows * in_flight(layout, stage))


def optimizer_bytes(num_parameters: int, layout: TrainingLayout) -> int:
    """Adam's two float32 moments, and the float32 copy of 16-bit parameters; shards of the distributed optimizer."""
    each = 8 if layout.parameter_bytes == 4 else 12
    shards = layout.data_parallel * layout.context_parallel if layout.distributed_optimizer else 1
    return each * -(-num_parameters // shards)


def layer_activations(shape: ModelShape, layer: KSALayer, layout: TrainingLayout, recompute: str | None = None) -> int:
    """Bytes that autograd saves in the forward pass of one layer for one micro-batch.

    Args:
        recompute: instead of the layout's.
    """
    recompute = recompute or layout.recompute
    size, tp, shards = layout.parameter_bytes, layout.tensor_parallel, layout.row_shards
    text = layout.rank_text
    all_rows = shape.ksa.rows.total_rows(text)
    stream = size * all_rows * shape.hidden // shards
    if recompute == "full":
        return stream
    # Full and window layers hold text rows alone, and read the values from the projection's output without a copy.
    full = not layer.has_summaries
    rows = text if full else all_rows
    query, kv, heads = size * rows * shape.query // tp, size * rows * shape.kv // tp, shape.heads // tp
    row_states = size * rows * shape.hidden // shards
    # Inputs of the two norms and of the projections behind them.
    total = stream + 3 * row_states + 2 * 4 * rows // shards
    if not layout.fused_norm:
        total += 2 * row_states
    total += _head_activations(shape, layout, query, kv, rows)
    # Rotated queries and keys, and in KSA layers a copy of the values.
    total += query + kv + (0 if full else kv)
    if not full or recompute == "selective":
        # The output projection's input; a full layer's is the attention's output itself.
        total += query
    if recompute != "selective":
        total += size * text * shape.query // tp + 4 * text * heads
        if not full and not layout.fused_attention:
            total += 2 * query
    if full and not shape.qk_norm:
        # The projection, which holds the values.
        total += query + 2 * kv
    ffn = size * rows * shape.ffn // tp
    return total + ffn * ((3 if layout.fused_swiglu else 5) if shape.gated else 2)


def _head_activations(shape: ModelShape, layout: TrainingLayout, query: int, kv: int, rows: int) -> int:
    """What Q/K norm and rotation save; query and kv are the bytes of the rows of queries and of keys."""
    size, tp = layout.parameter_bytes, layout.tensor_parallel
    if layout.fused_rotation:
        return query + 2 * kv
    # Cosines and sines, for queries and for keys; the same for every sample.
    angles = (2 * (query + kv) if shape.angles_per_head else 4 * size * rows * shape.head_dim) // layout.micro_batch
    if not shape.qk_norm:
        return angles
    # The projection, whose keys are normalised in place of their storage, and the queries' copy.
    norm = 2 * query + 2 * kv + 4 * rows * (shape.heads + shape.kv_heads) // tp
    return angles + norm + (0 if layout.fused_norm else query + kv)


def in_flight(layout: TrainingLayout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved (arXiv 2104.04473, section 2.2)."""
    stages, chunks = layout.pipeline_parallel, layout.virtual_stages
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(layout.num_micro_batches, stages - stage))
    warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, layout.num_micro_batches * chunks)
    return warm_up / chunks


def saved_activations(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """Bytes of tensors that a stage has saved before its first backward pass, without the logits."""
    layers = stage_layers(shape, layout, stage)
    each = [layer_activations(shape, layer, layout) for layer in layers]
    text, size = layout.rank_text, layout.parameter_bytes
    rows = shape.ksa.rows.total_rows(text)
    total = sum(each)
    if layout.recompute == "full":
        # Each unit keeps its input; float32 angles of queries and keys are an input of all.
        total = sum(each[:: layout.recompute_layers])
        angles = (shape.heads + shape.kv_heads) // layout.tensor_parallel if shape.angles_per_head else 2
        total += 4 * rows * shape.head_dim * angles // layout.micro_batch
    if stage == 0:
        total += 8 * text
    total = int(total * in_flight(layout, stage))
    if stage == layout.pipeline_parallel - 1:
        # The final norm's input and output, over all rows; the labels.
        states = size * rows * shape.hidden // layout.row_shards
        total += states * (2 if layout.fused_norm else 3) + 4 * rows // layout.row_shards + 8 * text
    return total


def stage_activations(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """Bytes of saved tensors of a stage at its fullest, without the logits.

    With full recompute one unit of layers is whole again while its backward pass runs.
    """
    total = saved_activations(shape, layout, stage)
    if layout.recompute == "full":
        layers, unit = stage_layers(shape, layout, stage), layout.recompute_layers
        whole = [layer_activations(shape, layer, layout, "none") for layer in layers]
        total += max(sum(whole[begin : begin + unit]) for begin in range(0, len(whole), unit))
    return total


def logits_bytes(shape: ModelShape, layout: TrainingLayout) -> int:
    """Logits of the tokens that are computed at a time, at the fullest moment, and a chunked loss's gradient sums.

    At once, that is the softmax in float32 and its gradient in the parameters' precision; in chunks the logits in
    that precision as well.
    """
    words, tokens, size = shape.vocabulary // layout.tensor_parallel, layout.rank_text, layout.parameter_bytes
    rows = layout.loss.rows_at_a_time(tokens, words)
    low = 0 if size == 4 else size
    if rows == tokens:
        return tokens * words * (4 + low)
    # Losses' maxima and sums; the weight's gradient in float32 and a chunk's product.
    gradient = 0 if layout.fused_gradient else words * shape.hidden * (4 + low)
    return rows * words * (4 + 2 * low) + 8 * tokens + gradient


def stage_memory(shape: ModelShape, layout: TrainingLayout, stage: int) -> MemoryReport:
    """Memory of one GPU of a pipeline stage."""
    number, trained = stage_parameters(shape, layout, stage), trained_parameters(shape, layout, stage)
    return MemoryReport(
        num_parameters=number,
        parameters=layout.parameter_bytes * number,
        gradients=layout.gradient_bytes * trained,
        optimizer=optimizer_bytes(trained, layout),
        activations=stage_activations(shape, layout, stage) + teacher_bytes(shape, layout, stage),
        logits=logits_bytes(shape, layout) if stage == layout.pipeline_parallel - 1 else 0,
    )


def fullest_stage(shape: ModelShape, layout: TrainingLayout) -> tuple[int, MemoryReport]:
    """The pipeline stage that needs most memory, and its memory."""
    reports = [stage_memory(shape, layout, stage) for stage in range(layout.pipeline_parallel)]
    return max(enumerate(reports), key=lambda numbered: numbered[1].total)


def report(shape: ModelShape, layout: TrainingLayout) -> str:
    """One line: GB on a GPU of the fullest pipeline stage, by what they hold."""
    stage, memory = fullest_stage(shape, layout)
    where = f" of pipeline stage {stage}" if layout.pipeline_parallel > 1 else ""
    words, tokens = shape.vocabulary // layout.tensor_parallel, layout.rank_text
    rows = layout.loss.rows_at_a_time(tokens, words)
    chunk = "" if rows == tokens else f" in chunks of {rows} tokens"
    parts = (
        (memory.parameters, "parameters"),
        (memory.gradients, "gradients"),
        (memory.optimizer, "optimizer state"),
        (memory.activations, f"activations with {layout.recompute} recompute"),
        (memory.logits, f"logits{chunk}"),
    )
    listed = ", ".join(f"{size / 1e9:,.3f} {name}" for size, name in parts)
    return (
        f"theoretical memory of a GPU{where}, {memory.num_parameters / 1e9:,.4f} billion parameters: "
        f"{memory.total / 1e9:,.3f} GB = {listed}"
    )
