"""What a KSA model takes of a GPU's memory, from its shape and the parallel layout; pure functions, no Megatron.

Counted are parameters, gradient buffers and optimizer state, and what the fullest moment of an iteration has beside
these: the tensors that autograd has saved until then, and the largest temporaries of that moment. It is one of three:
the loss, the backward pass of a layer, the optimizer's step. Not counted: communication buffers of NCCL, the
allocator's fragments and the CUDA context, which are 1 to 4 GB on a GPU; what summary rows save beside that while their
projections are blended with the text's. FP8 is counted as 16 bits. Experts (MoE) and multi-token prediction are not
described here.
"""

import dataclasses
from dataclasses import dataclass
from itertools import accumulate

from megatron_ksa.config.ksa import KSALayer
from megatron_ksa.config.recompute import NONE, Recompute
from megatron_ksa.cost.layer_memory import LayerMemory, layer_memory
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on one GPU of a pipeline stage.

    Attributes:
        num_parameters: parameters there (a number).
        parameters, gradients, optimizer: what is there all the time.
        activations: what autograd has saved when the first backward pass begins.
        working: what the fullest moment has beyond that.
        moment: the fullest moment: `loss`, `backward` or `optimizer`.
    """

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    moment: str

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All at the fullest moment."""
        return self.state + self.activations + self.working


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


def stage_chunks(shape: ModelShape, layout: TrainingLayout, stage: int) -> list[list[tuple[int, KSALayer]]]:
    """Number in the model and kind of the layers of a pipeline stage's model chunks, where Megatron divides evenly."""
    layers = list(enumerate(shape.layers(layout.text_length)))
    stages = layout.pipeline_parallel
    each = len(layers) // (stages * layout.virtual_stages)
    begins = (each * (stages * chunk + stage) for chunk in range(layout.virtual_stages))
    return [layers[begin : begin + each] for begin in begins]


def stage_layers(shape: ModelShape, layout: TrainingLayout, stage: int) -> list[KSALayer]:
    """The layers of a pipeline stage, all its model chunks together."""
    return [layer for chunk in stage_chunks(shape, layout, stage) for _, layer in chunk]


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
    """The part of `stage_parameters` that has gradients and optimizer state: all, or the summary parameters."""
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
    """Bytes that a stage keeps of the teacher's pass over one micro-batch.

    Its rows in the decoder's input, and of each KSA layer its attention output or the gradient of the comparison; with
    `teacher_on_host` of those layers that are not recomputed whole.
    """
    if not layout.distills:
        return 0
    begin = layout.recompute.whole if layout.teacher_on_host else 0
    chunks = stage_chunks(shape, layout, stage) if layout.compares_attention else []
    layers = sum(layer.has_summaries for chunk in chunks for _, layer in chunk[begin:])
    return (layers + 1) * _text_states(shape, layout)


def _text_states(shape: ModelShape, layout: TrainingLayout) -> int:
    """Bytes of the hidden states of a rank's text."""
    return layout.parameter_bytes * layout.rank_text * shape.hidden // layout.row_shards


def optimizer_bytes(num_parameters: int, layout: TrainingLayout) -> int:
    """Adam's two float32 moments, and the float32 copy of 16-bit parameters; shards of the distributed optimizer."""
    each = 8 if layout.parameter_bytes == 4 else 12
    shards = layout.data_parallel * layout.context_parallel if layout.distributed_optimizer else 1
    return each * -(-num_parameters // shards)


def in_flight(layout: TrainingLayout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved (arXiv 2104.04473, section 2.2)."""
    stages, chunks = layout.pipeline_parallel, layout.virtual_stages
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(layout.num_micro_batches, stages - stage))
    warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, layout.num_micro_batches * chunks)
    return warm_up / chunks


@dataclass(frozen=True)
class _Unit:
    """Layers that are computed again together, or one layer that is not.

    Attributes:
        kept: bytes after the forward pass.
        fullest: bytes at the fullest moment of the backward pass.
    """

    kept: int
    fullest: int


def _units(layers: list[LayerMemory], recompute: Recompute) -> list[_Unit]:
    """The units of a model chunk, in order; the result of a recomputed unit exists a second time."""
    whole, units = min(recompute.whole, len(layers)), []
    for begin in range(0, whole, recompute.unit):
        unit = layers[begin : min(begin + recompute.unit, whole)]
        before = accumulate((layer.whole for layer in unit), initial=0)
        fullest = max(done + layer.fullest(NONE) for done, layer in zip(before, unit, strict=False))
        units.append(_Unit(unit[0].stream, fullest + unit[-1].stream))
    inner = dataclasses.replace(recompute, whole=0, unit=1)
    return units + [_Unit(layer.kept(inner), layer.fullest(inner)) for layer in layers[whole:]]


def _stage_units(shape: ModelShape, layout: TrainingLayout, stage: int) -> list[list[_Unit]]:
    plain = dataclasses.replace(layout, recompute=NONE)
    return [
        _units([layer_memory(shape, layer, plain, layout.comm(number)) for number, layer in chunk], layout.recompute)
        for chunk in stage_chunks(shape, layout, stage)
    ]


def saved_activations(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """Bytes of tensors that a stage has saved before its first backward pass, without the logits."""
    text = layout.rank_text
    rows = shape.ksa.rows.total_rows(text)
    total = sum(unit.kept for chunk in _stage_units(shape, layout, stage) for unit in chunk)
    if layout.recompute.whole and not layout.fused_rotation:
        # Float32 angles of queries and keys are an input of every recomputed unit.
        angles = (shape.heads + shape.kv_heads) // layout.tensor_parallel if shape.angles_per_head else 2
        total += 4 * rows * shape.head_dim * angles // layout.micro_batch
    if stage == 0:
        total += 8 * text
    total = int((total + teacher_bytes(shape, layout, stage)) * in_flight(layout, stage))
    return total + _end_activations(shape, layout, stage)


def _end_activations(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """The part of `saved_activations` that one micro-batch saves behind the last layer.

    It is the final norm's input and output over all rows, the labels, and for every token the two numbers of a loss in
    chunks, or the teacher's final states.
    """
    if stage < layout.pipeline_parallel - 1:
        return 0
    text, shards = layout.rank_text, layout.row_shards
    rows = shape.ksa.rows.total_rows(text)
    states = layout.parameter_bytes * rows * shape.hidden // shards
    total = states * (2 if layout.fused_norm else 3) + 4 * rows * shape.norm_vectors // shards + 8 * text
    if layout.distills:
        return total + _text_states(shape, layout)
    return total if _whole_logits(shape, layout) else total + 8 * text


def _whole_logits(shape: ModelShape, layout: TrainingLayout) -> bool:
    """Whether the logits of all tokens exist at once."""
    tokens = layout.rank_text
    return layout.loss.rows_at_a_time(tokens, shape.vocabulary // layout.tensor_parallel) == tokens


def loss_working(shape: ModelShape, layout: TrainingLayout) -> int:
    """What output layer and loss add to the saved activations.

    Tokens at once: the softmax in float32 and its gradient in the parameters' precision. In chunks: the logits of two
    chunks, since the last one's exist until the next one's are there; the gradient of the hidden states; labels and
    statistics of every token; and, unless it is added to its buffer, the weight's gradient, summed in float32. At the
    end one chunk's logits stand beside a gradient of the weight in the parameters' precision, which Megatron's
    protocol asks for where the buffer has it already. Logits that are kept are one chunk. Distillation has two heads'
    logits, of frozen weights, and at the end multiplies the hidden states' gradient by a float32 number for each token.
    """
    words, tokens, size = shape.vocabulary // layout.tensor_parallel, layout.rank_text, layout.parameter_bytes
    states = _text_states(shape, layout)
    if layout.distills:
        rows = layout.loss.rows_at_a_time(tokens, 2 * words)
        logits = rows * words * size * (2 if rows == tokens else 4)
        return states + max(logits + 16 * tokens, states + 4 * states // size)
    if _whole_logits(shape, layout):
        return tokens * words * (4 + (0 if size == 4 else size))
    chunk, weight = layout.loss.rows_at_a_time(tokens, words) * words * size, words * shape.hidden
    states += 16 * tokens
    trained = layout.train == "all"
    summed = 4 * weight if trained and not layout.fused_gradient else 0
    if layout.loss.keeps_logits(tokens, words, size):
        return states + summed + tokens * words * size + size * weight * trained
    return states + summed + max(2 * chunk, chunk + size * weight * trained)


def backward_working(shape: ModelShape, layout: TrainingLayout, stage: int) -> int:
    """What the fullest moment in the layers' backward pass has beyond the saved activations; it may be below 0.

    A unit's own backward pass comes when those behind it in its chunk are done. The embedding's gradient comes last.
    """
    most = -(2**62)
    for chunk in _stage_units(shape, layout, stage):
        kept = sum(unit.kept for unit in chunk)
        before = 0
        for unit in chunk:
            most = max(most, before + unit.fullest - kept)
            before += unit.kept
        if stage == 0 and layout.train == "all":
            most = max(most, layout.parameter_bytes * shape.vocabulary * shape.hidden // layout.tensor_parallel - kept)
    gathered = layout.parameter_bytes * layout.rank_text * shape.hidden if layout.row_shards > 1 else 0
    if layout.distills and layout.teacher_on_host and layout.recompute.whole:
        # One layer's output comes back.
        gathered += _text_states(shape, layout)
    # The loss and the final norm are done.
    return most + gathered - _end_activations(shape, layout, stage)


def stage_memory(shape: ModelShape, layout: TrainingLayout, stage: int) -> MemoryReport:
    """Memory of one GPU of a pipeline stage."""
    number, trained = stage_parameters(shape, layout, stage), trained_parameters(shape, layout, stage)
    saved = saved_activations(shape, layout, stage)
    moments = {"backward": backward_working(shape, layout, stage)}
    if stage == layout.pipeline_parallel - 1:
        moments["loss"] = loss_working(shape, layout)
    # The optimizer takes gradients of 16 bits in float32; what autograd had saved is gone.
    moments["optimizer"] = (optimizer_bytes(trained, layout) // 3 if layout.gradient_bytes == 2 else 0) - saved
    moment, working = max(moments.items(), key=lambda item: item[1])
    return MemoryReport(
        num_parameters=number,
        parameters=layout.parameter_bytes * number,
        gradients=layout.gradient_bytes * trained,
        optimizer=optimizer_bytes(trained, layout),
        activations=saved,
        working=working,
        moment=moment,
    )


def fullest_stage(shape: ModelShape, layout: TrainingLayout) -> tuple[int, MemoryReport]:
    """The pipeline stage that needs most memory, and its memory."""
    reports = [stage_memory(shape, layout, stage) for stage in range(layout.pipeline_parallel)]
    return max(enumerate(reports), key=lambda numbered: numbered[1].total)


def report(shape: ModelShape, layout: TrainingLayout) -> str:
    """One line: GB on a GPU of the fullest pipeline stage, by what they hold."""
    stage, memory = fullest_stage(shape, layout)
    where = f" of pipeline stage {stage}" if layout.pipeline_parallel > 1 else ""
    parts = (
        (memory.parameters, "parameters"),
        (memory.gradients, "gradients"),
        (memory.optimizer, "optimizer state"),
        (memory.activations, f"activations, {layout.recompute} recomputed"),
        (memory.working, f"more in the {memory.moment}{_chunks(shape, layout) if memory.moment == 'loss' else ''}"),
    )
    listed = ", ".join(f"{size / 1e9:,.3f} {name}" for size, name in parts)
    return (
        f"theoretical memory of a GPU{where}, {memory.num_parameters / 1e9:,.4f} billion parameters: "
        f"{memory.total / 1e9:,.3f} GB = {listed}"
    )


def _chunks(shape: ModelShape, layout: TrainingLayout) -> str:
    words, tokens = shape.vocabulary // layout.tensor_parallel, layout.rank_text
    rows = layout.loss.rows_at_a_time(tokens, words)
    return "" if rows == tokens else f" in chunks of {rows} tokens"
