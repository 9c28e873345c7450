"""What the throughput script trains: models, kinds of layers, shapes, layouts, and the command line of each run."""

import argparse
from typing import NamedTuple

import model_1b9
from layouts import Layout

MODELS = ("ksa", "full")
# The same KSA model when only its summary parameters train, without and with distillation's teacher.
STAGES = {"summary": ["--ksa-train", "summary"], "distil": ["--ksa-distill"]}
LENGTHS = (8192, 32768, 131072)
# From here on the activations of the 24 layers do not fit 80 GB beside parameters and optimizer.
RECOMPUTE_FROM = 32768
# Iterations before those that count, and those, by length.
ITERATIONS = {8192: (3, 6), 32768: (2, 4), 131072: (1, 2)}
# One CUDA graph holds forward and backward passes of an iteration, after as many iterations without it.
GRAPH_WARM_UP = 3
GRAPHS = [
    "--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", str(GRAPH_WARM_UP),
    "--no-check-for-nan-in-loss-and-grad",
]  # fmt: skip
TE, FUSER = ["--transformer-impl", "transformer_engine"], ["--use-transformer-engine-op-fuser"]
# Kinds of layers and precision; with "+graph" the iteration is captured in a CUDA graph.
LAYERS = {
    "default": [], "local": ["--transformer-impl", "local"], "te": TE,
    **{f"fp8_{recipe}": [*TE, "--fp8-format", "hybrid", "--fp8-recipe", recipe]
       for recipe in ("delayed", "tensorwise", "blockwise")},
}  # fmt: skip
LAYERS |= {f"{kind}_fuser": [*LAYERS[kind], *FUSER] for kind in ("te", "fp8_tensorwise", "fp8_blockwise")}
KINDS = [kind + graph for graph in ("", "+graph") for kind in LAYERS]
# Flags of a shape, its layers and its K/V heads; 8b_8layers has layers of the 8B model's size.
SHAPES = {
    "1b9": ("", 24, 16),
    "8b_8layers": (
        "--num-layers 8 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8",
        8, 8,
    ),
    "8b": (
        "--num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8",
        36, 8,
    ),
}  # fmt: skip
# On several GPUs, where one more iteration is profiled; a step of a million tokens counts as it is profiled.
RANKS_ITERATIONS = {131072: (2, 3), 1048576: (1, 0)}


class Run(NamedTuple):
    """What is measured: model, text tokens, kind of layers, and the layout of several GPUs."""

    model: str
    length: int
    kind: str
    layout: Layout | None = None


def captures(kind: str, options: argparse.Namespace) -> bool:
    """Whether runs of a kind capture their iterations."""
    return options.cuda_graphs or kind.endswith("+graph")


def training_flags(
    model: str, length: int, kind: str, options: argparse.Namespace, layout: Layout | None = None
) -> list[str]:
    """The command line of `pretrain_gpt.py` for one run; with a layout, a rank's, which profiles an iteration more."""
    shape, layers, groups = SHAPES[options.shape]
    profiled = layout is not None or bool(options.profile)
    count = sum(iterations(length, kind, options, ranks=layout is not None)) + profiled
    more = [*STAGES.get(model, []), *shape.split()]
    more += ["--loss-chunk-rows", str(options.loss_rows), "--loss-kept-logits", str(options.kept_logits)]
    if (length >= RECOMPUTE_FROM or options.tiny) and not (layout and layout.fit):
        more += "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    if captures(kind, options):
        more += GRAPHS
    more += [*LAYERS[kind.removesuffix("+graph")], *(layout.flags if layout else [])]
    flags = model_1b9.training_flags(model, length, count, more, tiny=options.tiny, layers=layers, kv_heads=groups)
    return [*flags, *options.extra]


def iterations(length: int, kind: str, options: argparse.Namespace, ranks: bool = False) -> tuple[int, int]:
    """Iterations before those that count, and those; on several GPUs, without the one that is profiled."""
    by_length = RANKS_ITERATIONS if ranks else ITERATIONS
    warm_up, measured = by_length.get(length, (1, 2)) if options.iterations is None else (1, options.iterations)
    return warm_up + GRAPH_WARM_UP * captures(kind, options), measured
