"""A trained model from a Megatron distributed checkpoint, in one process, without the trainer and its flags."""

import argparse
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ksa.checkpoint.integrity import damage, is_iteration, way_out
from megatron_ksa.checkpoint.norm_names import ask_for_stored_names
from megatron_ksa.checkpoint.streaming import DistributedReader, cause, failure
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.options import destination
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small
from megatron_ksa.model.builder import KSAGPTModelBuilder, model_config_from_args
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.platform.ports import free_port

TRACKER = "latest_checkpointed_iteration.txt"
# What Megatron's tracker says where there is no iteration: weights to start from, without optimizer.
RELEASE = "release"
TRACKER_BYTES = 1000
# A process of its own runs unpartitioned, whatever layout the checkpoint was trained in.
ALONE = {
    "tensor_model_parallel_size": 1,
    "tensor_parallel_num_weight_shards": None,
    "gtp_weight_remat_size": 1,
    "expert_tensor_parallel_num_weight_shards": None,
    "expert_gtp_weight_remat_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "variable_seq_lengths": False,
    "tp_comm_overlap": False,
    "delay_wgrad_compute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "fine_grained_activation_offloading": False,
    "init_model_with_meta_device": False,
    "spec": None,
    "mtp_num_layers": None,
    "fp8": None,
    "fp4": None,
    "cuda_graph_impl": "none",
}


@dataclass(frozen=True)
class StoredCheckpoint:
    """One iteration of a checkpoint folder.

    Attributes:
        folder: the iteration's own folder.
        args: Megatron's arguments as saved by the trainer.
        settings: KSA and HARPE settings found among them.
    """

    folder: Path
    iteration: int
    args: argparse.Namespace
    settings: RunSettings


def iteration_folder(folder: Path, iteration: int | None = None) -> Path:
    """The folder of the newest, or the given, iteration under a `--save` folder.

    Raises:
        UsageError: no checkpoint there; with an iteration, naming those that there are.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise UsageError(f"{folder} is no checkpoint folder: it has no {TRACKER}")
    if iteration is None:
        text = read_small(tracker, limit=TRACKER_BYTES).strip()
        if text != RELEASE and not is_iteration(text):
            raise UsageError(f"{tracker} says {text[:40]!r}, an iteration number or {RELEASE!r} is needed")
        name = text if text == RELEASE else f"iter_{int(text):07d}"
    else:
        name = f"iter_{iteration:07d}"
    path = folder / name
    if not path.is_dir():
        stored = sorted(int(other.name[5:]) for other in folder.glob("iter_*") if is_iteration(other.name[5:]))
        listed = ", ".join(map(str, stored)) or "none"
        raise UsageError(f"{folder} has no checkpoint {path.name}: the folder is missing; iterations there: {listed}")
    return path


def find_checkpoint(folder: Path, iteration: int | None = None) -> StoredCheckpoint:
    """The arguments of the newest, or the given, iteration under a `--save` folder.

    Raises:
        UsageError: no checkpoint there, or not one that this project's trainer wrote.
    """
    path = iteration_folder(folder, iteration)
    try:
        args = dist_checkpointing.load_common_state_dict(str(path))["args"]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except CheckpointException as error:
        problem = damage(path)
        if isinstance(first := cause(error), UsageError) and not problem:
            raise UsageError(str(first) if str(path) in str(first) else f"{path}: {first}") from None
        raise UsageError(f"{path} cannot be read: {problem or failure(error)}; {way_out(path)}") from None
    except (CheckpointingException, OSError, KeyError, RuntimeError, EOFError, ValueError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:  # fmt: skip
        if problem := damage(path):
            raise UsageError(f"{problem}; {way_out(path)}") from None
        raise UsageError(f"{path} holds no arguments of the trainer (--ckpt-format torch_dist): {error}") from None
    iteration = 0 if path.name == RELEASE else int(path.name.removeprefix("iter_"))
    return StoredCheckpoint(path, iteration, args, stored_settings(args))


def stored_settings(args: argparse.Namespace) -> RunSettings:
    """KSA and HARPE settings among the trainer's arguments as saved in a checkpoint; those of Megatron's have none."""
    ksa = KSAConfig(
        **{
            field.name: getattr(args, destination(field, "ksa"), field.default)
            for field in KSAConfig.__dataclass_fields__.values()
        }
    )
    return RunSettings(ksa, getattr(args, "harpe_resolved_bases", None))


def single_process_groups() -> ProcessGroupCollection:
    """Megatron's process groups for a world of one."""
    if not torch.distributed.is_initialized():
        address = f"tcp://127.0.0.1:{free_port()}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def load_model(stored: StoredCheckpoint, defaults: dict[str, object], dtype: torch.dtype) -> KSAGPTModel:
    """Build the model that the stored arguments describe and load its weights.

    Args:
        stored: from `find_checkpoint`.
        defaults: what `prepare_platform` returned on this machine.
        dtype: of the parameters, float32, bfloat16 or float16.

    Returns:
        The whole model in eval mode, on the GPU where there is one; its attention takes sequences of any length. A
        model with a learned position table is refused.

    Raises:
        UsageError: a model that cannot be built here, or weights that are missing.
    """
    args = argparse.Namespace(**{**vars(stored.args), **ALONE, **defaults})
    if args.position_embedding_type not in ("rope", "harpe", "none"):
        raise UsageError(
            f"{stored.folder}: --position-embedding-type {args.position_embedding_type} cannot be evaluated, "
            f"only rope and harpe"
        )
    args.params_dtype, args.bf16, args.fp16 = dtype, dtype == torch.bfloat16, dtype == torch.float16
    args.use_cpu_initialization = True
    args.transformer_impl, args.apply_rope_fusion = "local", False
    groups = single_process_groups()
    config = model_config_from_args(args, stored.settings.ksa, stored.settings.bases)
    model = KSAGPTModelBuilder(config).build_model(groups).to(dtype)
    model.set_summary_coefficient(stored.settings.ksa.summary_coefficient(stored.iteration))
    names = DistributedReader(stored.folder).tensors
    state = {"model": ask_for_stored_names(model.sharded_state_dict(), names)}
    try:
        state = dist_checkpointing.load(state, str(stored.folder))
    except CheckpointException as error:
        problem = damage(stored.folder) or failure(error)
        raise UsageError(f"{stored.folder} cannot be read: {problem}; {way_out(stored.folder)}") from None
    except (CheckpointingException, KeyError) as error:
        raise UsageError(f"{stored.folder}: the weights do not fit the stored arguments: {error}") from None
    model.load_state_dict(state["model"])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
