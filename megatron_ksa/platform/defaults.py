"""What the trainer's flags should be on this machine, by what is installed; one call prepares everything."""

import argparse
import importlib
import os
from collections.abc import Sequence

import torch

from megatron_ksa.platform.ports import free_port
from megatron_ksa.platform.process import prepare_process

# Megatron leaves the interval unset and then divides by it.
EVAL_INTERVAL = 1000


def importable(module: str) -> bool:
    """Whether an optional compiled package is installed and loads."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def trainer_defaults() -> dict[str, object]:
    """Defaults of Megatron's arguments on this machine, for `ArgumentParser.set_defaults`: flags given by hand win.

    Returns:
        Argument destination -> default. Without Transformer Engine the local layers are the default, and each fusion
        whose kernel is missing is off. On a CPU gloo takes NCCL's place.
    """
    defaults: dict[str, object] = {"eval_interval": EVAL_INTERVAL}
    if not importable("fused_weight_gradient_mlp_cuda"):
        defaults["gradient_accumulation_fusion"] = False
    if not torch.cuda.is_available():
        return defaults | {
            "use_cpu_initialization": True,
            "transformer_impl": "local",
            "distributed_backend": "gloo",
            "masked_softmax_fusion": False,
            "no_persist_layer_norm": True,
            "bias_dropout_fusion": False,
            "bias_swiglu_fusion": False,
            "apply_rope_fusion": False,
            "num_workers": 0,
        }
    if not importable("transformer_engine.pytorch"):
        defaults |= {"transformer_impl": "local", "apply_rope_fusion": False}
    if not importable("scaled_masked_softmax_cuda"):
        defaults["masked_softmax_fusion"] = False
    if not importable("apex.contrib.layer_norm.layer_norm"):
        defaults["no_persist_layer_norm"] = True
    return defaults


def prepare_platform(argv: Sequence[str]) -> dict[str, object]:
    """Everything the machine needs before Megatron is imported; the first call of an entry point.

    Args:
        argv: the command line without the program's name; read from it are the parallel layout, --trust-checkpoint and
            --no-checkpoint-sums.

    Returns:
        `trainer_defaults()`.
    """
    _join_alone()
    layout = _layout(argv)
    _order_communication(layout)
    prepare_process(layout.use_torch_fsdp2, layout.trust_checkpoint, not layout.no_checkpoint_sums)
    return trainer_defaults()


def _join_alone() -> None:
    """Without a launcher, make this process a world of one, so that `python pretrain_gpt.py` trains too."""
    if "RANK" in os.environ:
        return
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def _layout(argv: Sequence[str]) -> argparse.Namespace:
    """What must be known of the parallel layout before Megatron, whose parser reads the rest, is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-model-parallel-size", default="1")
    parser.add_argument("--context-parallel-size", default="1")
    for flag in ("--use-torch-fsdp2", "--use-megatron-fsdp", "--overlap-moe-expert-parallel-comm",
                 "--trust-checkpoint", "--no-checkpoint-sums"):  # fmt: skip
        parser.add_argument(flag, action="store_true")
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError:
        # A flag without its value is Megatron's parser's to report.
        return parser.parse_args([])


def _order_communication(layout: argparse.Namespace) -> None:
    """Tensor and context parallelism want CUDA_DEVICE_MAX_CONNECTIONS=1 before CUDA starts; FSDP refuses it."""
    if layout.use_torch_fsdp2 or layout.use_megatron_fsdp or layout.overlap_moe_expert_parallel_comm:
        return
    if {layout.tensor_model_parallel_size, layout.context_parallel_size} != {"1"}:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
