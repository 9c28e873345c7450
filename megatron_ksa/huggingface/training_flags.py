"""An `Architecture` as flags and arguments of `pretrain_gpt.py`, and back."""

import argparse
import contextlib
import io

from megatron.training import arguments as megatron_arguments

from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.training.arguments import adapt_trainer, settings_from_args
from megatron_ksa.training.given import forget_given

# What an exported model cannot have: argument -> value that it can have, and flag to name.
NEEDED = {
    "normalization": ("RMSNorm", "--normalization RMSNorm"),
    "swiglu": (True, "--swiglu"),
    "add_bias_linear": (False, "--disable-bias-linear"),
    "apply_layernorm_1p": (False, "no --apply-layernorm-1p"),
    "num_experts": (None, "no --num-experts"),
    "multi_latent_attention": (False, "no --multi-latent-attention"),
    "mtp_num_layers": (None, "no --mtp-num-layers"),
    "attention_output_gate": (False, "no --attention-output-gate"),
    "qk_l2_norm": (False, "no --qk-l2-norm"),
}


def training_flags(arch: Architecture) -> list[str]:
    """The flags of `pretrain_gpt.py` that build this model."""
    values: dict[str, object] = {
        "num-layers": arch.num_layers,
        "hidden-size": arch.hidden_size,
        "ffn-hidden-size": arch.ffn_hidden_size,
        "num-attention-heads": arch.num_heads,
        "num-query-groups": arch.num_query_groups,
        "kv-channels": arch.head_dim,
        "seq-length": arch.seq_length,
        "max-position-embeddings": arch.max_positions,
        "normalization": "RMSNorm",
        "norm-epsilon": arch.norm_epsilon,
        "position-embedding-type": "rope" if arch.bases is None else "harpe",
        "rotary-base": arch.rotary_base,
        "rotary-percent": arch.rotary_percent,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "padded-vocab-size": arch.padded_vocab_size,
    }
    if arch.bases is not None:
        values["harpe-bases"] = ",".join(repr(float(base)) for base in arch.bases)
    if arch.rope_scaling_factor is not None:
        values["rope-scaling-factor"] = arch.rope_scaling_factor
    if arch.interpolation is not None:
        values["rotary-seq-len-interpolation-factor"] = arch.interpolation
    switches = {
        "group-query-attention": True,
        "swiglu": True,
        "disable-bias-linear": True,
        "qk-layernorm": arch.qk_norm,
        "add-qkv-bias": arch.qkv_bias,
        "untie-embeddings-and-output-weights": not arch.tied,
        "rotary-interleaved": arch.rotary_interleaved,
        "use-rope-scaling": arch.rope_scaling_factor is not None,
        "ksa": arch.ksa.enabled,
    }
    if arch.ksa.enabled:
        values |= {
            "ksa-chunk-size": arch.ksa.chunk_size,
            "ksa-summary-tokens": arch.ksa.summary_tokens,
            "ksa-window-chunks": arch.ksa.window_chunks,
            "ksa-layer-pattern": arch.ksa.layer_pattern,
        }
        if arch.ksa.initial_coefficient is not None:
            values["ksa-initial-coefficient"] = repr(arch.ksa.initial_coefficient)
        switches |= {
            "no-ksa-independent-projections": not arch.ksa.independent_projections,
            "ksa-independent-qk-norm": arch.ksa.independent_qk_norm,
            "ksa-independent-layernorm": arch.ksa.independent_layernorm,
        }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return flags + [f"--{name}" for name, given in switches.items() if given]


def training_args(arch: Architecture) -> argparse.Namespace:
    """The arguments that `pretrain_gpt.py` would store for these flags; `install_arguments` must have run.

    Raises:
        UsageError: settings that the trainer refuses.
    """
    parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([*training_flags(arch), "--micro-batch-size", "1", "--vocab-size", str(arch.vocab_size)])
    args.rank, args.world_size, args._is_global_batch_size_explicitly_specified = 0, 1, False
    settings = settings_from_args(args)
    forget_given(args)
    with contextlib.redirect_stdout(io.StringIO()):
        megatron_arguments.validate_args(args, {})
    adapt_trainer(args, settings)
    args.truncate_predict_nums = arch.predicted_tokens
    return args


def architecture_of(stored: StoredCheckpoint) -> Architecture:
    """What the arguments of a Megatron checkpoint say about the model.

    Raises:
        UsageError: a model that the exported layouts cannot hold.
    """
    args, settings = stored.args, stored.settings
    for name, (value, flag) in NEEDED.items():
        if getattr(args, name, value) != value:
            raise UsageError(
                f"{stored.folder}: only models with {flag} can be exported, {name} is {getattr(args, name)}"
            )
    if args.position_embedding_type not in ("rope", "harpe"):
        raise UsageError(
            f"{stored.folder}: only models with --position-embedding-type rope or harpe can be exported, this one has "
            f"{args.position_embedding_type}"
        )
    return Architecture(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
        padded_vocab_size=args.padded_vocab_size,
        max_positions=args.max_position_embeddings,
        seq_length=args.seq_length,
        norm_epsilon=args.layernorm_epsilon,
        rotary_base=args.rotary_base,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        rotary_percent=args.rotary_percent,
        rotary_interleaved=args.rotary_interleaved,
        rope_scaling_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        interpolation=args.rotary_seq_len_interpolation_factor,
        bases=settings.bases,
        ksa=settings.ksa,
        summary_coefficient=settings.ksa.summary_coefficient(stored.iteration),
        predicted_tokens=getattr(args, "truncate_predict_nums", None),
    )
