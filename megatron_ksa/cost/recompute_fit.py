"""The least recompute with which a pipeline stage fits a GPU: least in time, by what each choice computes again.

A choice keeps the first N layers of every model chunk as their inputs alone, and lets the other layers compute again
some modules: the MLP (products), or norms, heads and activation (memory traffic alone, see
`megatron_ksa.config.recompute`). Its time is that of the forward pass of what it computes again, for a micro-batch of
one rank:

    t = products / rate of products + attention's operations / rate of attention + bytes moved / bandwidth

with 2 operations for each weight and row in products, and 4 * head_dim for each visible pair of a head in attention.
The communication that whole layers repeat is not counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from megatron_ksa.config.ksa import KSALayer, LayerKind
from megatron_ksa.config.recompute import CHEAP, EVERY, NONE, Recompute
from megatron_ksa.cost.flops import visible_pairs
from megatron_ksa.cost.memory import MemoryReport, stage_chunks, stage_memory
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches, of which the choice needs the proportions: round numbers of an H100 with this model.

    Attributes:
        products: FLOP/s of the projections in 16 bits.
        attention: FLOP/s of attention's forward pass.
        bandwidth: bytes/s of kernels that compute little.
    """

    products: float = 650e12
    attention: float = 500e12
    bandwidth: float = 2.6e12


H100 = Rates()


@dataclass(frozen=True)
class Choice:
    """A recompute of one pipeline stage, what it needs, and what it costs.

    Attributes:
        memory: of one GPU of the stage.
        seconds: of what is computed again for one micro-batch.
        forward: seconds of the layers' whole forward pass, by the same rates.
    """

    recompute: Recompute
    memory: MemoryReport
    seconds: float
    forward: float

    @property
    def slowdown(self) -> float:
        """Share by which the layers take longer, a forward and a backward pass being three forward passes."""
        return self.seconds / (3 * self.forward)


@lru_cache(4096)
def layer_seconds(shape: ModelShape, layer: KSALayer, layout: TrainingLayout, rates: Rates = H100) -> dict[str, float]:
    """Seconds of the forward pass of a layer's modules, and of all of it (`whole`), on one rank for a micro-batch."""
    text, tp, size = layout.rank_text, layout.tensor_parallel, layout.parameter_bytes
    ksa = shape.ksa
    rows = ksa.rows.total_rows(text) if layer.has_summaries else text
    pairs: float
    if layer.kind == LayerKind.FULL:
        pairs = layout.text_length * (layout.text_length + 1) // 2
    else:
        tokens = ksa.summary_tokens * layer.has_summaries
        pairs = visible_pairs(layout.text_length, ksa.chunk_size, tokens, layer.window_chunks)
    pairs = pairs * layout.micro_batch / layout.context_parallel
    attention = 4 * pairs * shape.query / tp / rates.attention
    mlp_weights = shape.ffn * shape.hidden * (3 if shape.gated else 2)
    weights = mlp_weights + shape.hidden * (2 * shape.query + 2 * shape.kv)
    per_byte = size * rows / rates.bandwidth
    states, heads = shape.hidden / layout.row_shards, (shape.query + 2 * shape.kv) / tp
    # A norm reads and writes rows of hidden states, rotation the heads; SwiGLU reads two rows of the MLP for each that
    # it writes; a residual connection reads two and writes one.
    norms, rotation, activation = 4 * states * per_byte, 2 * heads * per_byte, 3 * shape.ffn / tp * per_byte
    if not shape.gated:
        activation = activation * 2 / 3
    products = 2 * rows * weights / tp / rates.products
    mlp = 2 * rows * mlp_weights / tp / rates.products + activation
    return {
        "norms": norms, "layernorm": norms, "heads": rotation, "activation": activation, "core_attn": attention,
        "mlp": mlp, "whole": products + attention + norms + rotation + activation + 6 * states * per_byte,
    }  # fmt: skip


def recompute_seconds(
    shape: ModelShape, layout: TrainingLayout, stage: int, recompute: Recompute, rates: Rates = H100
) -> float:
    """Seconds of what a stage computes again for one micro-batch."""
    total, plain = 0.0, replace(layout, recompute=NONE)
    for chunk in stage_chunks(shape, layout, stage):
        for number, (_, layer) in enumerate(chunk):
            seconds = layer_seconds(shape, layer, plain, rates)
            again = ("whole",) if number < recompute.whole else (*recompute.modules, *recompute.cheap)
            total += sum(seconds[name] for name in again)
    return total


def _subsets(cheap: tuple[str, ...], thorough: bool) -> Iterator[Recompute]:
    """What layers that are not recomputed whole may compute again: nothing, all that is cheap, and the MLP beside."""
    if not thorough:
        light = tuple(name for name in cheap if name != "activation")
        yield from (NONE, Recompute(cheap=cheap), Recompute(modules=("mlp",), cheap=light))
        return
    for bits in range(1 << len(cheap)):
        chosen = tuple(name for place, name in enumerate(cheap) if bits >> place & 1)
        yield Recompute(cheap=chosen)
        if "activation" not in chosen:
            yield Recompute(modules=("mlp",), cheap=chosen)


def _fewest(layers: int, choice: Callable[[int], Choice], budget: float) -> Choice | None:
    """The choice with the fewest whole layers, at most `layers`, that fits; more layers take less memory."""
    if choice(layers).memory.total > budget:
        return None
    low, high = 0, layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if choice(middle).memory.total <= budget else (middle + 1, high)
    return choice(high)


def choices(
    shape: ModelShape, layout: TrainingLayout, stage: int, budget: float, *, cheap: tuple[str, ...] = CHEAP,
    thorough: bool = True, rates: Rates = H100,
) -> Iterator[Choice]:  # fmt: skip
    """The choices that fit `budget` bytes, each with as few whole layers as its modules allow.

    Args:
        cheap: of `CHEAP`, what the layers can compute again.
        thorough: try every part of `cheap`, and not only all and nothing.
    """
    length = max(map(len, stage_chunks(shape, layout, stage)))
    forward = recompute_seconds(shape, layout, stage, Recompute(EVERY), rates)

    def choice(recompute: Recompute) -> Choice:
        memory = stage_memory(shape, replace(layout, recompute=recompute), stage)
        return Choice(recompute, memory, recompute_seconds(shape, layout, stage, recompute, rates), forward)

    def with_whole(others: Recompute, whole: int) -> Choice:
        return choice(replace(others, whole=whole))

    for others in _subsets(cheap, thorough):
        fewest = _fewest(length - 1, partial(with_whole, others), budget)
        if fewest is not None:
            yield fewest
            if not fewest.seconds:
                return
    for unit in range(1, length + 1):
        every = choice(Recompute(EVERY, unit))
        if every.memory.total <= budget:
            yield every
            break


def least(shape: ModelShape, layout: TrainingLayout, stage: int, budget: float, **options) -> Choice:
    """The choice that takes the least time among those that fit `budget` bytes; of equal ones that with least memory.

    Args:
        options: as in `choices`.

    Raises:
        UsageError: none fits.
    """
    fitting = list(choices(shape, layout, stage, budget, **options))
    if fitting:
        return min(fitting, key=lambda one: (one.seconds, one.memory.total))
    length = max(map(len, stage_chunks(shape, layout, stage)))
    units = (Recompute(EVERY, unit) for unit in range(1, length + 1))
    needed = min(stage_memory(shape, replace(layout, recompute=unit), stage).total for unit in units)
    where = f"pipeline stage {stage} of {layout.pipeline_parallel}" if layout.pipeline_parallel > 1 else "the model"
    raise UsageError(
        f"no recompute fits: with every layer recomputed {where} needs {needed / GIB:.2f} GiB of a GPU, and "
        f"{max(budget, 0) / GIB:.2f} are free: use more GPUs (--context-parallel-size, --tensor-model-parallel-size, "
        "--pipeline-model-parallel-size, --use-distributed-optimizer), or a shorter --seq-length"
    )
