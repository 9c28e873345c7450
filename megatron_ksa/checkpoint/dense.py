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
from functools import wraps
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron_ksa.checkpoint.extra_state import read_by_transformer_engine, stored_objects, without_missing
from megatron_ksa.checkpoint.identity import check_bases, check_identity
from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.model_sizes import check_model
from megatron_ksa.checkpoint.norm_names import ask_for_stored_names, stored_name
from megatron_ksa.checkpoint.to_load import checkpoint_to_load, load_folder, only_weights
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.model.summary_parameters import copy_shared_parameters, is_summary_parameter
from megatron_ksa.upstream.patches import apply
from megatron_ksa.upstream.trainer import SHARDED_STATE

AdaptKeys = Callable[[ShardedStateDict], ShardedStateDict]


def check_checkpoint(args: argparse.Namespace, settings: RunSettings) -> str | None:
    """Compare the checkpoint that will be loaded, if there is one, with the flags.

    Returns:
        What to log of a difference that is meant.

    Raises:
        UsageError: the model of the flags cannot go on from it, or cannot start from its weights.
    """
    stored = checkpoint_to_load(args)
    if stored is None:
        return None
    _check_kind(stored, args, settings)
    check_model(stored, args, only_weights(args))
    if only_weights(args):
        # Other KSA settings are meant then; other bases are not, unless the flag says so.
        return check_bases(stored.args, settings)
    return check_identity(stored.args, settings)


def _check_kind(stored: StoredCheckpoint, args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse a checkpoint with KSA for a model without, or the other way round, where that cannot work."""
    ksa, folder = stored.settings.ksa, load_folder(args)
    if ksa.enabled == settings.ksa.enabled:
        return
    kind, other = ("with", "without") if ksa.enabled else ("without", "with")
    if not only_weights(args):
        raise UsageError(
            f"--load {folder}: the checkpoint was written {kind} --ksa, the flags say {other}: add --finetune to start "
            f"from its weights (optimizer state is not taken over)"
        )
    if ksa.enabled and ksa.summary_coefficient(stored.iteration) != 0:
        raise UsageError(
            f"--load {folder}: iteration {stored.iteration} still uses its summary projections, with a weight of "
            f"{ksa.summary_coefficient(stored.iteration):g}: only a model annealed to 0 (--ksa-anneal-end) becomes a "
            f"dense one"
        )
    if not _is_distributed(stored):
        raise UsageError(
            f"--load {folder}: a checkpoint of --ckpt-format torch has one layout and one kind of model: only one of "
            f"--ckpt-format torch_dist starts a model {other} --ksa"
        )


def _is_distributed(stored: StoredCheckpoint) -> bool:
    return dist_checkpointing.check_is_distributed_checkpoint(str(stored.folder))


def dense_start(load_checkpoint: Callable, args: argparse.Namespace, settings: RunSettings) -> Callable:
    """Megatron's `load_checkpoint` that also takes a dense checkpoint for a KSA model, and an annealed one for a dense
    model, and norms under both of their names; after `check_checkpoint`.
    """

    @wraps(load_checkpoint)
    def load(models: list[MegatronModule], optimizer: object, *rest, **options) -> tuple[int, int]:
        stored, is_ksa = checkpoint_to_load(args), settings.ksa.enabled
        if stored is None or not _is_distributed(stored):
            return load_checkpoint(models, optimizer, *rest, **options)
        inner = unwrap_model(models)
        if stored.settings.ksa.enabled == is_ksa:
            missing = _Missing(stored.folder) if is_ksa and only_weights(args) else None
            with _stored_names(inner, stored.folder, missing):
                if missing is not None:
                    options["strict"] = False
                done = load_checkpoint(models, optimizer, *rest, **options)
            again = _starts_projections_again(stored, settings)
            if missing is not None and (missing.names or again):
                for model in inner:
                    copy_shared_parameters(model, None if again else missing.names)
                _tell_optimizer(args, optimizer)
            return done
        with _keys_of_the_other_kind(inner, stored.folder, to_ksa=is_ksa):
            # Everything that is asked for must be there; what a dense checkpoint lacks is not asked for.
            done = load_checkpoint(models, optimizer, *rest, strict=not is_ksa, **options)
        if is_ksa:
            for model in inner:
                copy_shared_parameters(model)
            _tell_optimizer(args, optimizer)
        return done

    return load


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


def _starts_projections_again(stored: StoredCheckpoint, settings: RunSettings) -> bool:
    """Whether a stage uses summary projections that its checkpoint no longer did."""
    return bool(settings.ksa.initial_coefficient) and stored.settings.ksa.summary_coefficient(stored.iteration) == 0


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
def _stored_names(models: list[MegatronModule], path: Path, adapt: AdaptKeys | None = None) -> Iterator[None]:
    """Let models ask for what a checkpoint has, norms by its names for them, after `adapt` has changed their keys."""
    stored, objects = dist_checkpointing.load_tensors_metadata(str(path)), stored_objects(str(path))

    def asked(state: ShardedStateDict) -> ShardedStateDict:
        state = ask_for_stored_names(state if adapt is None else adapt(state), stored)
        return without_missing(state, objects)

    ours = [model for model in models if isinstance(model, KSAGPTModel)]
    for model in ours:
        model.asked_of_checkpoint = asked
    try:
        with apply([] if ours else [SHARDED_STATE.given(asked)]), read_by_transformer_engine():
            yield
    finally:
        for model in ours:
            model.asked_of_checkpoint = None


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
