"""Start a KSA model from a dense checkpoint or another stage, and a dense model from a KSA one annealed to the end.

A dense model's checkpoint stacks its layers (`decoder.layers.<name>`), since all of them have the same parameters; a
KSA model's has a key for each layer (`decoder.layers.<number>.<name>`). Either is read in any parallel layout. Summary
projections and norms start as copies of the shared ones (docs/ksa.md, "Parameters"), the summary embedding as
initialised. With `--finetune` the same holds of a KSA checkpoint's summary projections that it lacks or no longer used
(a = 0).
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training

from megatron_ksa.checkpoint.load import stored_settings
from megatron_ksa.checkpoint.norm_names import ask_for_stored_names, stored_name
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.model.summary_parameters import copy_shared_parameters, is_summary_parameter

AdaptKeys = Callable[[ShardedStateDict], ShardedStateDict]


def install_dense_start(args: argparse.Namespace, settings: RunSettings) -> None:
    """Let `--load --finetune` take a dense checkpoint for a KSA model, and an annealed one for a dense model."""
    load_checkpoint = training.load_checkpoint

    def load(models: list[MegatronModule], optimizer: object, *rest, **options) -> tuple[int, int]:
        is_ksa, folder = settings.ksa.enabled, _distributed_checkpoint(args)
        inner = unwrap_model(models)
        if folder is None or _checkpoint_is_ksa(args, folder, is_ksa) == is_ksa:
            missing = _Missing(folder) if is_ksa and folder is not None and args.finetune else None
            with _stored_names(inner, folder, missing):
                if missing is not None:
                    options["strict"] = False
                done = load_checkpoint(models, optimizer, *rest, **options)
            if missing is not None and (missing.names or _starts_projections_again(folder, settings)):
                only = None if _starts_projections_again(folder, settings) else missing.names
                for model in inner:
                    copy_shared_parameters(model, only)
                _tell_optimizer(args, optimizer)
            return done
        with _keys_of_the_other_kind(inner, folder, to_ksa=is_ksa):
            # Everything that is asked for must be there; what a dense checkpoint lacks is not asked for.
            done = load_checkpoint(models, optimizer, *rest, strict=not is_ksa, **options)
        if is_ksa:
            for model in inner:
                copy_shared_parameters(model)
            _tell_optimizer(args, optimizer)
        return done

    training.load_checkpoint = load


def _tell_optimizer(args: argparse.Namespace, optimizer: object) -> None:
    """Let the optimizer's float32 parameters follow the model's 16-bit ones."""
    if optimizer is not None and (args.fp16 or args.bf16):
        optimizer.reload_model_params()


class _Missing:
    """Leaves out of a model's state the summary parameters that a checkpoint lacks, and notes their names."""

    def __init__(self, path: Path) -> None:
        self.stored = dist_checkpointing.load_tensors_metadata(str(path))
        self.names: set[str] = set()

    def __call__(self, state: ShardedStateDict) -> ShardedStateDict:
        lacks = {
            name for name, value in state.items()
            if is_summary_parameter(name) and isinstance(value, ShardedBase)
            and stored_name(value.key, self.stored) not in self.stored
        }  # fmt: skip
        self.names |= lacks
        return {name: value for name, value in state.items() if name not in lacks}


def _starts_projections_again(path: Path, settings: RunSettings) -> bool:
    """Whether a stage uses summary projections that its checkpoint no longer did."""
    common = dist_checkpointing.load_common_state_dict(str(path))
    saved = common.get("args")
    if saved is None or not settings.ksa.initial_coefficient:
        return False
    return stored_settings(saved).ksa.summary_coefficient(common.get("iteration", 0)) == 0


def _load_folder(args: argparse.Namespace) -> str | None:
    """The folder that Megatron loads from."""
    return args.load if checkpointing.checkpoint_exists(args.load) else args.pretrained_checkpoint


def _distributed_checkpoint(args: argparse.Namespace) -> Path | None:
    """The iteration's folder that is to be loaded; None where there is none, or of another format."""
    folder = _load_folder(args)
    if not checkpointing.checkpoint_exists(folder):
        return None
    iteration, release = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(folder))
    path = Path(checkpointing.get_checkpoint_name(folder, args.ckpt_step or iteration, release, return_base_dir=True))
    return path if path.is_dir() and dist_checkpointing.check_is_distributed_checkpoint(str(path)) else None


def _checkpoint_is_ksa(args: argparse.Namespace, path: Path, to_ksa: bool) -> bool:
    """Whether the checkpoint to be loaded has KSA on; `to_ksa` where that cannot be told.

    Raises:
        UsageError: the model has KSA on and the checkpoint has not, or the other way round, where that cannot work.
    """
    folder = _load_folder(args)
    common = dist_checkpointing.load_common_state_dict(str(path))
    saved, iteration = common.get("args"), common.get("iteration", 0)
    if saved is None:
        return to_ksa
    ksa = stored_settings(saved).ksa
    if ksa.enabled == to_ksa:
        return to_ksa
    kind, other = ("with", "without") if ksa.enabled else ("without", "with")
    if folder == args.load and not args.finetune:
        raise UsageError(
            f"--load {folder}: the checkpoint was written {kind} --ksa, the flags say {other}: add --finetune to start "
            f"from its weights (optimizer state is not taken over)"
        )
    if ksa.enabled and ksa.summary_coefficient(iteration) != 0:
        raise UsageError(
            f"--load {folder}: iteration {iteration} still uses its summary projections, with a weight of "
            f"{ksa.summary_coefficient(iteration):g}: only a model annealed to 0 (--ksa-anneal-end) becomes a dense one"
        )
    return ksa.enabled


@contextlib.contextmanager
def _keys_of_the_other_kind(models: list[MegatronModule], path: Path, to_ksa: bool) -> Iterator[None]:
    """Let models ask a checkpoint for the keys that the other kind of model writes."""
    for model in models:
        # Megatron's name for one key a layer; every layer's configuration is this object.
        model.config.hetereogenous_dist_checkpoint = not to_ksa
    try:
        with _stored_names(models, path, _dense_keys if to_ksa else None):
            yield
    finally:
        for model in models:
            model.config.hetereogenous_dist_checkpoint = to_ksa


@contextlib.contextmanager
def _stored_names(models: list[MegatronModule], path: Path | None, adapt: AdaptKeys | None = None) -> Iterator[None]:
    """Let models ask for norms by the names that a checkpoint has, after `adapt` has changed their keys."""
    if path is None:
        yield
        return
    stored = dist_checkpointing.load_tensors_metadata(str(path))

    def asking(state_of: Callable[..., ShardedStateDict]) -> Callable[..., ShardedStateDict]:
        def state(*args, **kwargs) -> ShardedStateDict:
            made = state_of(*args, **kwargs)
            return ask_for_stored_names(made if adapt is None else adapt(made), stored)

        return state

    for model in models:
        model.sharded_state_dict = asking(model.sharded_state_dict)
    try:
        yield
    finally:
        for model in models:
            del model.sharded_state_dict


def _dense_keys(state: ShardedStateDict) -> ShardedStateDict:
    """What a dense checkpoint has of a KSA model's state, under the dense model's keys."""
    kept = {}
    for name, value in state.items():
        if is_summary_parameter(name):
            continue
        if isinstance(value, ShardedBase):
            # `SplitLayerNorm` of text rows; the second is how Megatron's local layers name their input norm.
            value.key = value.key.replace("input_layernorm.text.", "input_layernorm.")
            value.key = value.key.replace("linear_qkv.layer_norm_text.", "linear_qkv.layer_norm_")
        kept[name] = value
    return kept
