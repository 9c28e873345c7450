"""What `--recompute-to-fit` does not go with."""

import argparse

from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.training.given import given_flags

# What says by hand what is recomputed.
BY_HAND = (
    "recompute_activations", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "distribute_saved_activations",
)  # fmt: skip
# Layouts that give stages different numbers of layers.
UNEVEN = (
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


def check_fit(args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse flags beside `--recompute-to-fit` that choose recompute themselves, or that the memory model leaves out.

    Args:
        args: Megatron's arguments as parsed.

    Raises:
        UsageError: naming both flags and the way out.
    """
    if settings.fit.margin is None:
        return
    given = given_flags(args)
    for name in BY_HAND:
        if name in given or getattr(args, name, None):
            flag = given.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"--recompute-to-fit chooses what is recomputed, and so does {flag}: drop one of them")
    undescribed = "the memory model does not describe that; use --recompute-granularity"
    refused = {
        "a model without --ksa and --position-embedding-type harpe": settings.is_megatron,
        "--num-experts": args.num_experts is not None,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        **{f"--{name.replace('_', '-')}": getattr(args, name, None) for name in UNEVEN},
    }
    for what, active in refused.items():
        if active:
            raise UsageError(f"--recompute-to-fit does not go with {what}: {undescribed}")
    if args.cuda_graph_impl == "local":
        raise UsageError(
            "--recompute-to-fit does not go with --cuda-graph-impl local, which captures layers one by one: use "
            "full_iteration or none"
        )
