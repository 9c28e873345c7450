"""Feasible parallel layouts of a model on a cluster: memory of a GPU, bytes on the wire of a step, and a time estimate.

Assumptions of the time: every operation runs at one share of the peak rate; nothing is overlapped, so that all
communication adds to it; tensor parallelism stays within a node and comes first in the order of ranks, then context,
data and pipeline parallelism (Megatron's order), and a group that fits in a node uses the node's bandwidth; the bubble
of a pipeline is (stages - 1) / micro-batches of its work (1F1B, arXiv 2104.04473); each stage recomputes the least that
fits (`recompute_fit.least`), and the stage that recomputes most sets the pace.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ksa.config.ksa import KSALayer
from megatron_ksa.config.recompute import FULL, Recompute
from megatron_ksa.cost.memory import MemoryReport, fullest_stage, stage_chunks, stage_parameters
from megatron_ksa.cost.recompute_fit import GIB, Choice, least
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.cost.traffic import HeadShape, bytes_sent
from megatron_ksa.errors import UsageError

# Share of a GPU's memory left to communication buffers, the allocator's fragments and the CUDA context.
RESERVED = 0.1


@dataclass(frozen=True)
class Cluster:
    """GPUs and what they do.

    Attributes:
        gpus: of all nodes.
        gpus_per_node: GPUs that reach each other at node_bandwidth.
        memory: bytes of a GPU.
        flops: peak FLOP/s of a GPU.
        efficiency: share of the peak that the arithmetic reaches.
        node_bandwidth: bytes/s that a GPU sends within its node.
        network_bandwidth: bytes/s that a GPU sends to other nodes.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    flops: float
    efficiency: float
    node_bandwidth: float
    network_bandwidth: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                flag = field.name.replace("_", "-")
                raise UsageError(f"--{flag} is {getattr(self, field.name)}: use a number above 0")
        if self.efficiency > 1:
            raise UsageError(f"--efficiency is {self.efficiency}: it is a share, use at most 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise UsageError(
                f"--gpus {self.gpus} are no whole nodes of {self.gpus_per_node}: "
                f"use {below} or {below + self.gpus_per_node}"
            )

    @classmethod
    def of_h100(cls, gpus: int) -> "Cluster":
        """H100 of 80 GB in nodes of eight, with the rates and bandwidths that are assumed where none are given.

        The efficiency is that of the 1.9B model (docs/results.md): at 131,072 tokens 0.54 on one GPU and 0.51 with
        CP 2, at 1,048,576 with CP 4 0.48, at 8,192 without recompute 0.49 in CUDA graphs and 0.43 without.
        """
        return cls(
            gpus, gpus_per_node=8, memory=80e9, flops=989e12, efficiency=0.5, node_bandwidth=450e9,
            network_bandwidth=50e9,
        )  # fmt: skip

    def bandwidth(self, span: int) -> float:
        """Bytes/s of a GPU in a group whose members lie within `span` successive ranks."""
        return self.node_bandwidth if span <= self.gpus_per_node else self.network_bandwidth


@dataclass(frozen=True)
class Plan:
    """One layout.

    Attributes:
        choices: what each pipeline stage recomputes, and its memory.
        sent: bytes that the busiest rank sends in a step, by kind.
        seconds: of a step.
    """

    layout: TrainingLayout
    choices: list[Choice]
    sent: dict[str, int]
    seconds: float

    @property
    def memory(self) -> MemoryReport:
        """Memory of the fullest GPU."""
        return max((choice.memory for choice in self.choices), key=lambda memory: memory.total)

    @property
    def slowest(self) -> Choice:
        """The choice of the stage that recomputes most, which sets the pace."""
        return max(self.choices, key=lambda choice: choice.slowdown)


def layouts(shape: ModelShape, base: TrainingLayout, global_batch: int, cluster: Cluster) -> Iterator[TrainingLayout]:
    """Every layout that the trainer accepts, whether or not it fits in memory; `base` gives precision and length."""
    for tp in _divisors(min(cluster.gpus, cluster.gpus_per_node)):
        if shape.heads % tp or shape.kv_heads % tp or shape.ffn % tp or cluster.gpus % tp:
            continue
        for cp in _divisors(cluster.gpus // tp):
            step = (shape.ksa.chunk_size if shape.ksa.enabled else 1) * (2 * cp if cp > 1 else 1) * tp
            if base.text_length % step:
                continue
            for pp in _divisors(cluster.gpus // (tp * cp)):
                dp = cluster.gpus // (tp * cp * pp)
                if shape.num_layers % pp or global_batch % (base.micro_batch * dp):
                    continue
                yield dataclasses.replace(
                    base, tensor_parallel=tp, sequence_parallel=tp > 1, context_parallel=cp, pipeline_parallel=pp,
                    data_parallel=dp, num_micro_batches=global_batch // (base.micro_batch * dp),
                )  # fmt: skip


def bytes_on_the_wire(
    shape: ModelShape, layout: TrainingLayout, recomputes: Sequence[Recompute] | None = None
) -> dict[str, int]:
    """Bytes that the busiest rank sends in one step, by kind of parallelism.

    Tensor: with sequence parallelism, two all-gathers and two reduce-scatters of the rows a layer and pass, and one
    more all-gather in each of the two backward passes of a gathered input; the embedding scatters its rows and gathers
    their gradients, the output layer gathers twice and scatters once. Context: `traffic.bytes_sent`. Both:
    forward, backward, and forward again in layers that are recomputed whole. Pipeline: the rows at the borders of a
    stage. Data: gradients reduce-scattered and parameters gathered once. Left out is what does not grow with rows times
    hidden size or with parameters, about 1 % in small models (tests/training/test_wire.py).

    Args:
        recomputes: of each pipeline stage; the layout's where it is None.
    """
    tp, cp, pp = layout.tensor_parallel, layout.context_parallel, layout.pipeline_parallel
    ksa, recomputes = shape.ksa, recomputes or [layout.recompute] * pp
    # Of each stage: a layer, how often it has a forward pass, and its kind of context parallelism.
    stages = [
        [
            (layer, 1 + (place < recompute.whole), layout.comm(number))
            for chunk in stage_chunks(shape, layout, stage)
            for place, (number, layer) in enumerate(chunk)
        ]
        for stage, recompute in enumerate(recomputes)
    ]
    summaries = ksa.rows.summary_rows(layout.rank_text)
    heads = HeadShape(shape.heads // tp, shape.kv_heads // tp, shape.head_dim, layout.parameter_bytes)

    def tensor(layer: KSALayer, forwards: int, _: str) -> int:
        rows = layout.rank_text + summaries * layer.has_summaries
        gathered = layout.parameter_bytes * rows * shape.hidden * (tp - 1) // tp
        return gathered * (4 * forwards + 4 + 2)

    def context(layer: KSALayer, forwards: int, comm: str) -> int:
        if cp == 1:
            return 0
        passes = {"forwards": forwards, "backwards": 1}
        return layout.micro_batch * bytes_sent(layer, ksa, layout.text_length, cp, comm, heads, **passes)

    text = layout.parameter_bytes * layout.rank_text * shape.hidden * (tp - 1) // tp
    ends = [text * ((2 if stage == 0 else 0) + (3 if stage == pp - 1 else 0)) for stage in range(pp)]
    border = layout.parameter_bytes * (layout.rank_text + summaries) * shape.hidden // layout.row_shards
    number = max(stage_parameters(shape, layout, stage) for stage in range(pp))
    shards = layout.data_parallel * cp
    batches = layout.num_micro_batches
    cost = {layer: (tensor(*layer), context(*layer)) for stage in stages for layer in set(stage)}
    return {
        "tensor": batches
        * max(end + sum(cost[layer][0] for layer in stage) for end, stage in zip(ends, stages, strict=True)),
        "context": batches * max(sum(cost[layer][1] for layer in stage) for stage in stages),
        "pipeline": batches * border * (0 if pp == 1 else 2 if pp > 2 else 1),
        "data": (layout.gradient_bytes + layout.parameter_bytes) * number * (shards - 1) // shards,
    }


def seconds_of_step(
    layout: TrainingLayout, sent: dict[str, int], flops: float, cluster: Cluster, slowdown: float
) -> float:
    """Time of a step.

    Args:
        flops: the model's of the whole batch, forward and backward.
        slowdown: share by which recompute prolongs them.
    """
    tp, cp, dp = layout.tensor_parallel, layout.context_parallel, layout.data_parallel
    work = flops * (1 + slowdown)
    span = {"tensor": tp, "context": tp * cp, "data": tp * cp * dp, "pipeline": cluster.gpus}
    wire = {kind: number / cluster.bandwidth(span[kind]) for kind, number in sent.items()}
    busy = work / (cluster.gpus * cluster.flops * cluster.efficiency) + wire["tensor"] + wire["context"]
    bubble = (layout.pipeline_parallel - 1) / layout.num_micro_batches
    return busy * (1 + bubble) + wire["pipeline"] + wire["data"]


def plan(shape: ModelShape, base: TrainingLayout, global_batch: int, flops: float, cluster: Cluster) -> list[Plan]:
    """The layouts that fit, fastest first.

    Raises:
        UsageError: none does.
    """
    limit, smallest, plans = cluster.memory * (1 - RESERVED), None, []
    for layout in layouts(shape, base, global_batch, cluster):
        full = fullest_stage(shape, dataclasses.replace(layout, recompute=FULL))[1].total
        smallest = min(smallest or full, full)
        if full <= limit:
            choices = [least(shape, layout, stage, limit, thorough=False) for stage in range(layout.pipeline_parallel)]
            sent = bytes_on_the_wire(shape, layout, [choice.recompute for choice in choices])
            slowdown = max(choice.slowdown for choice in choices)
            plans.append(Plan(layout, choices, sent, seconds_of_step(layout, sent, flops, cluster, slowdown)))
    if smallest is None:
        raise UsageError(
            f"no layout divides {cluster.gpus} GPUs with a batch of {global_batch} sequences: use a multiple of the "
            f"number of data-parallel replicas, such as --global-batch-size {cluster.gpus}"
        )
    if not plans:
        raise UsageError(
            f"no layout fits: the smallest needs {smallest / 1e9:.3g} GB a GPU, {limit / 1e9:.3g} GB are free: use "
            f"more GPUs, or --memory {smallest / (1 - RESERVED) / 1e9:.3g}"
        )
    return sorted(plans, key=lambda each: each.seconds)


def layout_flags(plan: Plan, cluster: Cluster) -> list[str]:
    """Launch flags of a layout, one a line of an argument file; the run makes the choice of recompute again."""
    layout = plan.layout
    flags = [
        f"--tensor-model-parallel-size {layout.tensor_parallel}",
        f"--context-parallel-size {layout.context_parallel}",
        f"--pipeline-model-parallel-size {layout.pipeline_parallel}",
        "--use-distributed-optimizer",
    ]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    if any(choice.seconds for choice in plan.choices):
        flags.append(f"--recompute-to-fit {cluster.memory * RESERVED / GIB:.1f}")
    return flags


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
