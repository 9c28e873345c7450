"""`--use-checkpoint-args` for everything that the model depends on: Megatron 0.19.2 leaves out part of it."""

import argparse
import dataclasses
from collections.abc import Mapping

from megatron.training import checkpointing

from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination
from megatron_ksa.errors import UsageError

# Arguments that change the model and that Megatron does not take from the checkpoint.
LEFT_OUT = (
    "qk_layernorm",
    "layernorm_epsilon",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    # Words of the text vocabulary, from a released checkpoint; an export writes the number again.
    "truncate_predict_nums",
)


def take_stored_args(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """Set the model's arguments to the checkpoint's where Megatron does not: norms, rope scaling, KSA and HARPE.

    The annealing schedule stays that of the flags: it belongs to the run. With `--harpe-override-checkpoint-bases` the
    bases do too. A dense checkpoint says nothing about KSA: with `--ksa --finetune` a KSA model starts from it.
    """
    for name in LEFT_OUT:
        if hasattr(stored, name):
            setattr(args, name, getattr(stored, name))
    for field in dataclasses.fields(KSAConfig) if getattr(stored, "ksa", False) else ():
        name = destination(field, "ksa")
        if field.name in KSAConfig().identity() and hasattr(stored, name):
            setattr(args, name, getattr(stored, name))
    bases = getattr(stored, "harpe_resolved_bases", None)
    if bases is not None and not args.harpe_override_checkpoint_bases:
        args.harpe_bases = ",".join(repr(float(base)) for base in bases)


# Given by hand, these win over the checkpoint: its weights can be trained on with other values.
BY_HAND = {
    "attention_dropout", "hidden_dropout", "rotary_base", "rotary_percent", *LEFT_OUT,
    "moe_token_dispatcher_type", "moe_router_topk_scaling_factor", "moe_grouped_gemm", "spec",
    # What KSA and HARPE settings depend on is compared with the checkpoint later.
    *(destination(field, "ksa") for field in dataclasses.fields(KSAConfig)),
    *(destination(field, "harpe") for field in dataclasses.fields(HarpeConfig)),
    # They exist to be given beside --use-checkpoint-args.
    "tokenizer_model", "tokenizer_type", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size",
}  # fmt: skip


def load_stored_args(args: argparse.Namespace, given: Mapping[str, str]) -> None:
    """`--use-checkpoint-args`: set the model's arguments to those of the checkpoint that will be loaded.

    Args:
        args: changed in place.
        given: destination -> flag of what was given by hand.

    Raises:
        UsageError: a flag given by hand that the checkpoint's weights do not allow, with both values.
    """
    by_hand = {name: getattr(args, name) for name in given if hasattr(args, name)}
    position_embedding_type = args.position_embedding_type
    for load_arg in ("pretrained_checkpoint", "load"):
        found = checkpointing.load_args_from_checkpoint(args, load_arg=load_arg)
        if isinstance(found, tuple):
            take_stored_args(*found)
    # Megatron would quietly go back to the checkpoint's: whether other bases are meant is checked later.
    if args.harpe_override_checkpoint_bases or position_embedding_type == "harpe":
        args.position_embedding_type = position_embedding_type
    if any(name.startswith("harpe_base") for name in by_hand):
        args.harpe_bases = by_hand.get("harpe_bases")
    for name, value in by_hand.items():
        stored = getattr(args, name)
        if stored == value:
            continue
        if name not in BY_HAND:
            raise UsageError(
                f"{given[name]} {value}: the checkpoint of --use-checkpoint-args says {stored}, and its weights go "
                f"with that alone: drop {given[name]}"
            )
        setattr(args, name, value)
