"""Which layers a run has where no flag says so: those that were measured faster, or those of its checkpoint."""

import argparse

from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.to_load import only_weights
from megatron_ksa.training.given import given_flags

LOCAL, TE = "local", "transformer_engine"
NAMES = {LOCAL: "local", TE: "Transformer Engine's"}
# Tokens/s of the 1.9B model at 8,192 tokens in bf16, both on one machine in one run, and its GPU: in CUDA graphs of
# whole iterations and without (examples/throughput_1b9/results_kinds_graphs_h100.json, results_kinds_h100.json).
MEASURED = {
    True: {LOCAL: 40_311, TE: 40_429},
    False: {LOCAL: 27_732, TE: 33_290},
}  # fmt: skip
GPU = "H100"


def fastest(in_graphs: bool) -> str:
    """The layers of the larger number."""
    return max(MEASURED[in_graphs], key=lambda kind: MEASURED[in_graphs][kind])


def asks_for_transformer_engine(args: argparse.Namespace) -> str | None:
    """The flag given that Transformer Engine's layers alone have, or were not compared in."""
    needed = {
        "--fp8-format": args.fp8, "--tp-comm-overlap": args.tp_comm_overlap,
        "--use-transformer-engine-op-fuser": args.use_transformer_engine_op_fuser,
        "--num-experts": args.num_experts, "--symmetric-ar-type": args.symmetric_ar_type,
    }  # fmt: skip
    return next((flag for flag, given in needed.items() if given), None)


def choose_layers(args: argparse.Namespace, stored: StoredCheckpoint | None) -> str | None:
    """Set `transformer_impl` where both kinds of layers can be had and no flag chooses.

    Args:
        args: before Megatron's validation; without Transformer Engine its default is `local`.
        stored: the checkpoint that is loaded. A run that goes on keeps its layers, and so its numbers to the bit.

    Returns:
        What to say of the choice, in a line; None where there was none.
    """
    if args.transformer_impl != TE or "transformer_impl" in given_flags(args):
        return None
    if flag := asks_for_transformer_engine(args):
        return f"layers: Transformer Engine's, because of {flag}"
    kept = None if stored is None or only_weights(args) else getattr(stored.args, "transformer_impl", None)
    if kept in NAMES:
        args.transformer_impl = kept
        return f"layers: {NAMES[kept]}, as the checkpoint's (--transformer-impl takes others)"
    in_graphs = args.cuda_graph_impl == "full_iteration"
    args.transformer_impl = fastest(in_graphs)
    other = TE if args.transformer_impl == LOCAL else LOCAL
    own, theirs = (MEASURED[in_graphs][kind] for kind in (args.transformer_impl, other))
    return (
        f"layers: {NAMES[args.transformer_impl]}, {own:,} tokens/s against {theirs:,} of {NAMES[other]} "
        f"{'in CUDA graphs' if in_graphs else 'without CUDA graphs'} (1.9B model, 8,192 tokens, bf16, one {GPU}; "
        f"--transformer-impl {other} takes those)"
    )
