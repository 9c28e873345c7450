"""Sizes and optimizer of a checkpoint compared with the flags': a difference is told by its flag, not by a shape."""

import argparse

from megatron_ksa.checkpoint.load import RELEASE, StoredCheckpoint
from megatron_ksa.errors import UsageError

# What the shapes of the tensors follow from, beside the vocabulary (which a built tokenizer tells).
MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "swiglu", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
)  # fmt: skip
# What changes what the weights compute, but no shape; another value may be meant.
NOTED = ("position_embedding_type", "rotary_base", "rotary_percent", "norm_epsilon", "squared_relu", "quick_geglu")
# What an optimizer's state depends on.
OPTIMIZER = ("optimizer", "sixteen_bit", "use_distributed_optimizer")
EXPERTS = "expert_model_parallel_size"
# What the order of parameters on a rank follows from.
ORDER = ("transformer_impl", "tensor_model_parallel_size", "pipeline_model_parallel_size")
FLAGS = {"sixteen_bit": "--bf16 or --fp16", "add_bias_linear": "biases of linear layers (--disable-bias-linear)"}


def check_model(stored: StoredCheckpoint, args: argparse.Namespace, only_weights: bool) -> None:
    """Compare the flags with the arguments that a checkpoint holds, except those that only one of the two has.

    Args:
        only_weights: the optimizer's state is not loaded.

    Raises:
        UsageError: the first that differs, with both values and the way out.
    """
    saved, given = _values(stored.args), _values(args)
    for name in MODEL:
        _compare(name, saved, given, "give the checkpoint's value, or --use-checkpoint-args")
    for name in NOTED if args.rank == 0 else ():
        if None not in (saved.get(name), given.get(name)) and saved[name] != given[name]:
            print(f"note: {_flag(name)} is {given[name]}, the checkpoint was trained with {saved[name]}", flush=True)
    if not _takes_optimizer(stored, args, only_weights):
        return
    for name in OPTIMIZER:
        _compare(name, saved, given, "give what it was written with, or --no-load-optim to begin with a new optimizer")
    if given.get("num_experts") and len({values.get(EXPERTS) == 1 for values in (saved, given)}) == 2:
        _compare(
            EXPERTS, saved, given, "experts that ranks share out have an optimizer of their own, those of size 1 have "
            "not: give a size of the checkpoint's kind, or --no-load-optim"
        )  # fmt: skip


def check_order(stored: StoredCheckpoint, args: argparse.Namespace, only_weights: bool) -> None:
    """Refuse an optimizer's state in the order of other parameters, after the layers are chosen.

    `--use-distributed-optimizer` stores its state, float32 parameters too, bucket by bucket in the order in which
    layers register parameters; local layers register a norm before the projections, Transformer Engine's in one of
    them. Ranks of other tensor-parallel and pipeline sizes have other parameters.

    Args:
        only_weights: the optimizer's state is not loaded.

    Raises:
        UsageError: one of `ORDER` is another in the checkpoint.
    """
    saved = vars(stored.args)
    for name in ORDER if is_by_order(saved) and _takes_optimizer(stored, args, only_weights) else ():
        _compare(
            name, saved, vars(args), "give the checkpoint's, whose optimizer's state is in the order of "
            "its layers' parameters (not with --dist-ckpt-optim-fully-reshardable), or --no-load-optim"
        )  # fmt: skip


def is_by_order(saved: dict[str, object]) -> bool:
    """Whether a checkpoint with these arguments holds its optimizer's state bucket by bucket."""
    return bool(saved.get("use_distributed_optimizer") and not saved.get("dist_ckpt_optim_fully_reshardable"))


def check_adam(stored: StoredCheckpoint, args: argparse.Namespace, only_weights: bool) -> None:
    """Refuse the state of an Adam that this machine has not: torch's counts steps for each parameter, others by group.

    Args:
        args: `adam_library` is the package from where Megatron takes Adam: torch, transformer_engine or apex.
        only_weights: the optimizer's state is not loaded.

    Raises:
        UsageError: one is torch's and the other is not.
    """
    saved, here = getattr(stored.args, "adam_library", None), args.adam_library
    if saved is None or args.optimizer != "adam" or not _takes_optimizer(stored, args, only_weights):
        return
    if (saved == "torch") != (here == "torch"):
        raise UsageError(
            f"the checkpoint's optimizer is the Adam of {saved}, this machine's that of {here}, which counts steps in "
            f"another form: go on where Megatron takes that of {saved}, or give --no-load-optim to begin with a new one"
        )


def _takes_optimizer(stored: StoredCheckpoint, args: argparse.Namespace, only_weights: bool) -> bool:
    # A release, such as an import, is weights alone.
    return not (only_weights or args.no_load_optim or stored.folder.name == RELEASE)


def _values(args: argparse.Namespace) -> dict[str, object]:
    values = dict(vars(args))
    if not values.get("group_query_attention"):
        values["num_query_groups"] = values.get("num_attention_heads")
    if values.get("add_bias_linear"):
        values["add_qkv_bias"] = True  # Megatron's validation sets it, which has not run on the flags
    if "bf16" in values:
        values["sixteen_bit"] = bool(values["bf16"] or values.get("fp16"))
    return values


def _compare(name: str, saved: dict[str, object], given: dict[str, object], way_out: str) -> None:
    if saved.get(name) is None or given.get(name) is None or saved[name] == given[name]:
        return
    raise UsageError(
        f"{_flag(name)}: the checkpoint was written with {saved[name]}, the flags say {given[name]}: {way_out}"
    )


def _flag(name: str) -> str:
    return FLAGS.get(name, f"--{name.replace('_', '-')}")
