"""Start a KSA model from a dense checkpoint, and a dense model from a KSA checkpoint annealed to the end.

A dense model's checkpoint stacks its layers (`decoder.layers.<name>`), since all of them have the same parameters; a
KSA model's has a key for each layer (`decoder.layers.<number>.<name>`). Either is read in any parallel layout. Summary
projections and norms start as copies of the shared ones (SPEC: "Parameters"), the summary embedding as initialised.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training

from megatron_ksa.checkpoint.load import stored_settings
from megatron_ksa.errors import UsageError
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.model.layers import SplitLayerNorm
from megatron_ksa.training.arguments import ModelSettings

SUMMARY_PARAMETERS = ("summary_embedding.", ".linear_qkv_summary.", ".q_layernorm_summary.", ".k_layernorm_summary.")


def install_dense_start(args: argparse.Namespace, settings: ModelSettings) -> None:
    """Let `--load --finetune` take a dense checkpoint for a KSA model, and an annealed one for a dense model."""
    load_checkpoint = training.load_checkpoint

    def load(models: list[MegatronModule], optimizer: object, *rest, **options) -> tuple[int, int]:
        is_ksa = settings.ksa.enabled
        if _checkpoint_is_ksa(args, is_ksa) == is_ksa:
            return load_checkpoint(models, optimizer, *rest, **options)
        inner = unwrap_model(models)
        with _keys_of_the_other_kind(inner, to_ksa=is_ksa):
            # Everything that is asked for must be there; what a dense checkpoint lacks is not asked for.
            done = load_checkpoint(models, optimizer, *rest, strict=not is_ksa, **options)
        if is_ksa:
            for model in inner:
                copy_shared_parameters(model)
            if optimizer is not None and (args.fp16 or args.bf16):
                optimizer.reload_model_params()
        return done

    training.load_checkpoint = load


def _checkpoint_is_ksa(args: argparse.Namespace, to_ksa: bool) -> bool:
    """Whether the checkpoint to be loaded has KSA on; `to_ksa` where that cannot be told.

    Raises:
        UsageError: the model has KSA on and the checkpoint has not, or the other way round, where that cannot work.
    """
    folder = args.load if checkpointing.checkpoint_exists(args.load) else args.pretrained_checkpoint
    if not checkpointing.checkpoint_exists(folder):
        return to_ksa
    iteration, release = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(folder))
    iteration = args.ckpt_step or iteration
    path = checkpointing.get_checkpoint_name(folder, iteration, release, return_base_dir=True)
    if not Path(path).is_dir() or not dist_checkpointing.check_is_distributed_checkpoint(path):
        return to_ksa
    saved = dist_checkpointing.load_common_state_dict(path).get("args")
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
def _keys_of_the_other_kind(models: list[MegatronModule], to_ksa: bool) -> Iterator[None]:
    """Let models ask a checkpoint for the keys that the other kind of model writes."""
    for model in models:
        # Megatron's name for one key a layer; every layer's configuration is this object.
        model.config.hetereogenous_dist_checkpoint = not to_ksa
        if isinstance(model, KSAGPTModel):
            model.adapt_keys = _dense_keys if to_ksa else None
    try:
        yield
    finally:
        for model in models:
            model.config.hetereogenous_dist_checkpoint = to_ksa
            if isinstance(model, KSAGPTModel):
                model.adapt_keys = None


def _dense_keys(state: ShardedStateDict) -> ShardedStateDict:
    """What a dense checkpoint has of a KSA model's state, under the dense model's keys."""
    kept = {}
    for name, value in state.items():
        if any(part in f".{name}" for part in SUMMARY_PARAMETERS) or "input_layernorm.summary." in name:
            continue
        if isinstance(value, ShardedBase):
            # `SplitLayerNorm` of text rows; the second is how Megatron's local layers name their input norm.
            value.key = value.key.replace("input_layernorm.text.", "input_layernorm.")
            value.key = value.key.replace("linear_qkv.layer_norm_text.", "linear_qkv.layer_norm_")
        kept[name] = value
    return kept


def copy_shared_parameters(model: MegatronModule) -> None:
    """Set the summary projections and norms of every layer to the shared ones."""
    for module in model.modules():
        if isinstance(module, KSASelfAttention):
            _copy(module.linear_qkv, module.linear_qkv_summary)
            _copy(module.q_layernorm, module.q_layernorm_summary)
            _copy(module.k_layernorm, module.k_layernorm_summary)
        elif isinstance(module, SplitLayerNorm):
            _copy(module.text, module.summary)


def _copy(source: MegatronModule | None, target: MegatronModule | None) -> None:
    if target is not None:
        target.load_state_dict(source.state_dict())
