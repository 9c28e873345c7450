"""Layer norms under either of the names that Megatron's layer specs give them in a checkpoint.

Transformer Engine fuses a norm with the linear layer behind it, and the norm's parameters are that layer's; Megatron's
local layers write the same names (`sharded_state_dict_keys_map`). Specs that keep the norm apart write its own name.
"""

from collections.abc import Container

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict

FUSED_AND_APART = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


def other_name(key: str) -> str | None:
    """Its other name: `...mlp.linear_fc1.layer_norm_weight` <-> `...pre_mlp_layernorm.weight`; None of others."""
    for names in FUSED_AND_APART:
        for name, other in (names, reversed(names)):
            head, found, tail = key.rpartition(name)
            if found and head.endswith("."):
                return f"{head}{other}{tail}"
    return None


def stored_name(key: str, stored: Container[str]) -> str:
    """The name of a tensor in a checkpoint that holds the names `stored`; `key` where it holds neither."""
    other = other_name(key)
    return other if other is not None and key not in stored and other in stored else key


def ask_for_stored_names(state: ShardedStateDict, stored: Container[str]) -> ShardedStateDict:
    """Let a model's state, {name: sharded tensor}, ask for the names that a checkpoint holds; changed in place."""
    for value in state.values():
        if isinstance(value, ShardedBase):
            value.key = stored_name(value.key, stored)
    return state
