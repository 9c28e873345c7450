"""Recompute of a model that is built: what Megatron's flags decide when a layer is made, changed in place."""

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ksa.config.recompute import Recompute
from megatron_ksa.model.saved_again import SavedAgain

# Attribute of a layer.
SAVED_AGAIN = "_saved_again"


def set_recompute(model: MegatronModule, recompute: Recompute) -> None:
    """Let a model chunk compute again in the backward pass what `recompute` says, and keep the rest.

    Args:
        model: holds Megatron's transformer blocks; dense layers (no experts), no FP8, whose layers are told otherwise.
    """
    for block in model.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for name, value in recompute.settings().items():
            setattr(block.config, name, value)
        for number, layer in enumerate(block.layers):
            modules = () if number < recompute.whole else recompute.modules
            layer.recompute_input_layernorm = layer.recompute_pre_mlp_layernorm = "layernorm" in modules
            layer.recompute_mlp = "mlp" in modules
            layer.self_attention.checkpoint_core_attention = "core_attn" in modules
            _save_again(layer, () if number < recompute.whole else recompute.cheap)


def _save_again(layer: TransformerLayer, modules: tuple[str, ...]) -> None:
    """Let a layer compute `modules` of `CHEAP` again, in place of those that it did before."""
    before = vars(layer).pop(SAVED_AGAIN, None)
    if before is not None:
        before.remove()
    if modules:
        vars(layer)[SAVED_AGAIN] = SavedAgain(layer, modules)
