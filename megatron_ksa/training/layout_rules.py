"""Parallel layouts that cannot work, refused before any process group is built, with the nearest value that works."""

import argparse
import math

from megatron_ksa.config.patterns import MAX_ENTRIES
from megatron_ksa.errors import UsageError

SIZES = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size", "tensor_model_parallel_size",
    "context_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
    "train_iters", "train_samples", "eval_interval", "log_interval", "tensorboard_log_interval", "vocab_size",
    "make_vocab_size_divisible_by", "rotary_base", "moe_router_topk", "exit_interval", "exit_duration_in_mins",
    "distributed_timeout_minutes", "check_weight_hash_across_dp_replicas_interval",
)  # fmt: skip
# Megatron keeps sizes as 32-bit integers here and there; layers and heads have lists with an entry each.
LARGEST, LARGEST_COUNT = 2**31 - 1, MAX_ENTRIES
COUNTS = ("num_layers", "num_attention_heads", "num_query_groups")
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


def check_sizes(args: argparse.Namespace) -> None:
    """Check that sizes are from 1 to what is possible, before anything divides by them or makes lists of them.

    What is not given is Megatron's to choose.

    Raises:
        UsageError: naming the flag.
    """
    for name in SIZES:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        largest = LARGEST_COUNT if name in COUNTS else LARGEST
        if value is not None and value > largest:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at most {largest:,}")


def check_layout(args: argparse.Namespace) -> None:
    """Check that processes, heads, layers, experts and batch divide as the parallel sizes ask.

    Args:
        args: Megatron's arguments as parsed, before its own validation (whose assertions name no way out).

    Raises:
        UsageError: naming both flags, their values and the nearest value that works.
    """
    tp, cp, pp = (
        getattr(args, f"{kind}_parallel_size") for kind in ("tensor_model", "context", "pipeline_model")
    )  # fmt: skip
    _check_heads(args, tp)
    _check_processes(args.world_size, tp * cp * pp, f"--tensor-model-parallel-size {tp} x --context-parallel-size {cp} "
                     f"x --pipeline-model-parallel-size {pp}")  # fmt: skip
    _check_stages(args, pp)
    if args.ffn_hidden_size:
        _check_divisor("--tensor-model-parallel-size", tp, "--ffn-hidden-size", args.ffn_hidden_size)
    _check_experts(args, pp)
    _check_batch(args, args.world_size // (tp * cp * pp))
    if (args.max_position_embeddings or args.seq_length) < args.seq_length:
        raise UsageError(
            f"--max-position-embeddings {args.max_position_embeddings} is below --seq-length {args.seq_length}: use "
            f"{args.seq_length} or more"
        )


def _check_heads(args: argparse.Namespace, tp: int) -> None:
    heads = args.num_attention_heads
    if args.kv_channels and args.kv_channels % 2 and args.position_embedding_type in ("rope", "harpe"):
        raise UsageError(f"--kv-channels {args.kv_channels}: channels are rotated in pairs, an even number is needed")
    if args.kv_channels is None:
        _check_divisor("--num-attention-heads", heads, "--hidden-size", args.hidden_size)
    _check_divisor("--tensor-model-parallel-size", tp, "--num-attention-heads", heads)
    groups = args.num_query_groups if args.group_query_attention else heads
    _check_divisor("--num-query-groups", groups, "--num-attention-heads", heads)
    if groups % tp and tp % groups:
        works = [size for size in _divisors(heads) if not (groups % size and size % groups)]
        raise UsageError(
            f"--tensor-model-parallel-size {tp} is neither a divisor nor a multiple of --num-query-groups {groups}: "
            f"use {_nearest(tp, works)}"
        )


def _check_stages(args: argparse.Namespace, pp: int) -> None:
    """Layers by pipeline stages; layouts that give stages different numbers of layers are Megatron's to check."""
    uneven = (
        args.pipeline_model_parallel_layout, args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers, args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
    )  # fmt: skip
    if any(uneven):
        return
    layers = args.num_layers
    _check_divisor("--pipeline-model-parallel-size", pp, "--num-layers", layers)
    stages = args.num_virtual_stages_per_pipeline_rank
    if stages and pp > 1 and layers // pp % stages:
        raise UsageError(
            f"--num-virtual-stages-per-pipeline-rank {stages} does not divide the {layers // pp} layers of a pipeline "
            f"stage (--num-layers {layers}, --pipeline-model-parallel-size {pp}): use "
            f"{_nearest(stages, _divisors(layers // pp))}"
        )
    chunk = args.num_layers_per_virtual_pipeline_stage
    if chunk and layers // pp % chunk:
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {chunk} does not divide the {layers // pp} layers of a pipeline "
            f"stage: use {_nearest(chunk, _divisors(layers // pp))}"
        )


def _check_experts(args: argparse.Namespace, pp: int) -> None:
    ep = args.expert_model_parallel_size
    if not args.num_experts:
        return
    _check_divisor("--expert-model-parallel-size", ep, "--num-experts", args.num_experts)
    if args.moe_router_topk > args.num_experts:
        raise UsageError(
            f"--moe-router-topk {args.moe_router_topk} is above --num-experts {args.num_experts}: a token has at most "
            "so many"
        )
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    _check_processes(args.world_size, etp * ep * pp, f"--expert-tensor-parallel-size {etp} (unset: "
                     f"--tensor-model-parallel-size) x --expert-model-parallel-size {ep} x "
                     f"--pipeline-model-parallel-size {pp}")  # fmt: skip


def _check_batch(args: argparse.Namespace, dp: int) -> None:
    micro, batch = args.micro_batch_size, args.global_batch_size
    if micro is None or batch is None or args.decrease_batch_size_if_needed or batch % (micro * dp) == 0:
        return
    raise UsageError(
        f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro} x data-parallel size {dp} = "
        f"{micro * dp}: use {_nearest_multiple(batch, micro * dp)}"
    )


def _check_processes(world: int, size: int, layout: str) -> None:
    if world % size:
        raise UsageError(
            f"{world} processes do not divide into {layout} = {size}: start {_nearest_multiple(world, size)} of them"
        )


def _check_divisor(flag: str, value: int, whole_flag: str, whole: int) -> None:
    if whole % value:
        raise UsageError(
            f"{flag} {value} does not divide {whole_flag} {whole}: use {_nearest(value, _divisors(whole))}"
        )


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _nearest(value: int, works: list[int]) -> str:
    """The largest of `works` below the value and the smallest above it."""
    below, above = [w for w in works if w < value], [w for w in works if w > value]
    return " or ".join(str(w) for w in (*below[-1:], *above[:1]))


def _nearest_multiple(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"
