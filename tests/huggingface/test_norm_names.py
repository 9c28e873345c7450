"""Norms under both names that layer specs give them: fused with the linear layer behind them, and apart."""

import dataclasses

import pytest
from models import GOLDEN, assert_same_tensors, save_family
from renamed_norms import rename_norms
from single_process import process_groups, transformer_config

from megatron_ksa.checkpoint.load import RELEASE
from megatron_ksa.checkpoint.norm_names import other_name, stored_name
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.model import layer_specs

NAMES = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    "decoder.layers.7.self_attention.linear_qkv.layer_norm_text.weight": "decoder.layers.7.input_layernorm.text.weight",
    "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.layer_norm_bias":
        "optimizer.state.exp_avg.decoder.layers.pre_mlp_layernorm.bias",
    "decoder.layers.0.self_attention.linear_qkv.weight": None,
    "decoder.final_layernorm.weight": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "other"), NAMES.items())
def test_other_name(name, other):
    assert other_name(name) == other
    if other is not None:
        assert other_name(other) == name
        assert stored_name(name, {other}) == other and stored_name(name, {name, other}) == name
    assert stored_name(name, {}) == name


@pytest.mark.parametrize("family", ["qwen3", "ksa"])
def test_checkpoints_with_norms_apart_are_exported(family, to_megatron, to_huggingface, tmp_path):
    source = GOLDEN
    if family != "ksa":
        source = tmp_path / "hf"
        save_family(family, source)
    megatron = to_megatron(source, tmp_path / "megatron")
    renamed = rename_norms(megatron / RELEASE)
    assert any("input_layernorm." in name for name in renamed) and any("pre_mlp_layernorm." in name for name in renamed)
    assert_same_tensors(to_huggingface(megatron, tmp_path / "back"), source)


def test_transformer_engine_layers_write_the_names_of_local_ones(monkeypatch):
    """HARPE and KSA layers keep the input norm apart; its mapped name was lost."""
    process_groups()
    config, ksa = transformer_config(), KSAConfig(enabled=True, layer_pattern="kklf", independent_layernorm=True)
    local = layer_specs.get_gpt_decoder_layer_specs(config, False, "RMSNorm", False)
    fused = [
        dataclasses.replace(
            spec, submodules=dataclasses.replace(spec.submodules, sharded_state_dict_keys_map={"mlp.0.weight": "x"})
        )
        for spec in local
    ]
    monkeypatch.setattr(layer_specs, "get_gpt_decoder_layer_specs", lambda *args, **kwargs: fused)
    for spec in layer_specs.ksa_block_spec(config, ksa, 64).layer_specs:
        names = spec.submodules.sharded_state_dict_keys_map
        assert names == {"mlp.0.weight": "x", "input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
