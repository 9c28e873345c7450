"""`--use-checkpoint-args` for everything that the model depends on: Megatron 0.19.2 leaves out part of it."""

import argparse
import dataclasses

from megatron.training import checkpointing

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination

# Arguments that change the model and that Megatron does not take from the checkpoint.
LEFT_OUT = (
    "qk_layernorm",
    "layernorm_epsilon",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    # Of a released checkpoint, which its export has again.
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


def install_checkpoint_args() -> None:
    """Run `take_stored_args` wherever Megatron reads its arguments from a checkpoint."""
    load_args = checkpointing.load_args_from_checkpoint

    def load_all_args(args: argparse.Namespace, load_arg: str = "load", checkpointing_context: dict | None = None):
        position_embedding_type = args.position_embedding_type
        found = load_args(args, load_arg, checkpointing_context)
        if isinstance(found, tuple):
            take_stored_args(*found)
            # Megatron would quietly go back to the checkpoint's: whether other bases are meant is checked later.
            if args.harpe_override_checkpoint_bases or position_embedding_type == "harpe":
                args.position_embedding_type = position_embedding_type
        return found

    checkpointing.load_args_from_checkpoint = load_all_args
