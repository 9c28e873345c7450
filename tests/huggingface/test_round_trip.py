"""Hugging Face -> Megatron -> Hugging Face gives the same bits, for every family."""

import dataclasses
import json
import shutil
import weakref

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from models import FAMILIES, GOLDEN, VOCABULARY, assert_same_tensors, read_tensors, save_family
from safetensors.torch import save_file
from single_process import build_model, transformer_config

from megatron_ksa.checkpoint.load import find_checkpoint
from megatron_ksa.checkpoint.streaming import DistributedReader
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.config_json import read_config, write_config
from megatron_ksa.huggingface.shards import ShardReader
from megatron_ksa.huggingface.tensors import UNUSED, empty_objects, groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_and_settings_survive(family, dtype, to_megatron, to_huggingface, tmp_path):
    save_family(family, tmp_path / "hf", dtype)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    back = to_huggingface(megatron, tmp_path / "back", like=tmp_path / "hf", max_shard_bytes=20_000)
    assert_same_tensors(back, tmp_path / "hf")
    assert read_config(back) == read_config(tmp_path / "hf")
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "hf"))
    assert config["architectures"] == original["architectures"] and config["eos_token_id"] == 2
    assert (back / "generation_config.json").exists()


def test_released_ksa_layout(to_megatron, to_huggingface, tmp_path):
    """The unused head rows of the summary tokens come back too."""
    first = to_megatron(GOLDEN, tmp_path / "first")
    exported = to_huggingface(first, tmp_path / "exported")
    assert_same_tensors(exported, GOLDEN)
    second = to_megatron(exported, tmp_path / "second")
    files = [path.relative_to(first) for path in sorted(first.rglob("*.distcp"))]
    assert files
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_annealed_checkpoint_keeps_its_spare_projections(to_megatron, to_huggingface, tmp_path):
    """The released 4B checkpoint has mix_coeff 0: the model has no summary projections, the way back has them."""
    source = tmp_path / "annealed"
    shutil.copytree(GOLDEN, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mix_coeff": 0.0}))
    megatron = to_megatron(source, tmp_path / "megatron")
    assert not find_checkpoint(megatron).settings.ksa.independent_projections
    back = to_huggingface(megatron, tmp_path / "back")
    assert_same_tensors(back, GOLDEN)
    assert json.loads((back / "config.json").read_text())["mix_coeff"] == 0.0


def test_rows_of_the_padding_are_cut(to_megatron, to_huggingface, tmp_path):
    save_family("qwen3", tmp_path / "hf")
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    cut = read_tensors(to_huggingface(megatron, tmp_path / "cut", vocab_size=90))
    whole = read_tensors(tmp_path / "hf")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(cut[name], whole[name][:90])


def test_derived_and_repeated_tensors_are_passed_over(to_megatron, to_huggingface, tmp_path):
    """Old Llama files store rotary frequencies, and some tied ones the head."""
    save_family("llama3", tmp_path / "hf", shard_size="1GB")
    shutil.copytree(tmp_path / "hf", tmp_path / "more")
    tensors = read_tensors(tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "more" / "model.safetensors")
    megatron = to_megatron(tmp_path / "more", tmp_path / "megatron")
    assert_same_tensors(to_huggingface(megatron, tmp_path / "back"), tmp_path / "hf")


KSA = KSAConfig(enabled=True, layer_pattern="kklf", independent_layernorm=True, independent_qk_norm=True)
ARCHITECTURE = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_query_groups=2, head_dim=8, vocab_size=64,
    padded_vocab_size=64, max_positions=256, seq_length=64, norm_epsilon=1e-6, rotary_base=10000, tied=False,
    qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "arch",
    [
        ARCHITECTURE,
        dataclasses.replace(ARCHITECTURE, qkv_bias=True, qk_norm=False, tied=True),
        dataclasses.replace(ARCHITECTURE, ksa=KSA, qkv_bias=True),
        dataclasses.replace(ARCHITECTURE, ksa=dataclasses.replace(KSA, independent_projections=False)),
    ],
)
def test_tensors_are_those_of_the_model(arch):
    """Names and shapes that the converter writes are what Megatron asks for."""
    config = transformer_config(add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm)
    model = build_model(arch.ksa, config, share_embeddings_and_output_weights=arch.tied)
    tensors, objects = {}, set()
    for value in model.sharded_state_dict().values():
        for part in value.build() if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(part, ShardedObject):
                objects.add((part.key, part.global_offset[0], part.global_shape[0]))
            else:
                tensors[part.key] = tuple(part.global_shape)
    ours = {slot.key: slot.size for group in groups(arch) for slot in group.megatron}
    assert {key: size for key, size in ours.items() if not key.startswith(UNUSED)} == tensors
    written = set(empty_objects(arch))
    assert objects <= written
    # Transformer Engine's layers ask for these too.
    assert all("norm" in key or "core_attention" in key for key, _, _ in written - objects)
    assert ("decoder.final_layernorm._extra_state", 0, 1) in written


def test_own_config_describes_the_same_model(tmp_path):
    arch = dataclasses.replace(
        ARCHITECTURE, ksa=KSA, qkv_bias=True, bases=(1e4, 123456.7), rotary_percent=0.5, rotary_interleaved=True
    )
    (tmp_path / "config.json").write_text(json.dumps(write_config(arch, "float32")))
    assert read_config(tmp_path, seq_length=64) == arch


def test_memory_is_that_of_one_group(to_megatron, to_huggingface, tmp_path, monkeypatch):
    """Of the tensors read, no more are alive than one conversion, and at export one shard, needs."""
    save_family("llama2", tmp_path / "hf")
    alive = {"now": 0, "most": 0}

    def watched(read):
        def reading(self, name):
            tensor = read(self, name)
            alive["now"] += tensor.nbytes
            alive["most"] = max(alive.values())
            weakref.finalize(tensor, lambda size: alive.update(now=alive["now"] - size), tensor.nbytes)
            return tensor

        return reading

    for reader in (ShardReader, DistributedReader):
        monkeypatch.setattr(reader, "read", watched(reader.read))
    largest = VOCABULARY * 32 * 4
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert 0 < alive["most"] <= 2 * largest
    alive.update(now=0, most=0)
    to_huggingface(megatron, tmp_path / "back", max_shard_bytes=largest)
    assert 0 < alive["most"] <= 3 * largest
