"""Folders of models that were read differently than the transformers library reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import save_family
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_ksa.huggingface.config_json import read_config
from megatron_ksa.huggingface.shards import INDEX, SINGLE, ShardReader

CASES = Path(__file__).parent / "cases"
LINEAR = {"rope_type": "linear", "factor": 2.0}
# What stands in config.json about rotary positions.
ROTARY = [
    {"rope_scaling": {**LINEAR, "rope_theta": 500000.0}},
    {"rope_scaling": {**LINEAR, "rope_theta": 500000.0}, "rope_theta": 20000.0},
    {"rope_scaling": LINEAR, "rope_theta": 20000.0},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}},
    {"rope_scaling": {}, "rope_theta": 20000.0},
    {"rope_theta": 20000.0},
    {},
]


@pytest.mark.parametrize("rotary", ROTARY, ids=json.dumps)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rotary_settings_are_what_transformers_reads(rotary, family, tmp_path):
    """A base inside rope_scaling was ignored: logits off by more than their size."""
    config = json.loads((CASES / "rope_theta_inside_rope_scaling.json").read_text())
    config = {**config, "model_type": family} | {"rope_scaling": None} | rotary
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected, found = AutoConfig.from_pretrained(tmp_path).rope_parameters, read_config(tmp_path)
    assert found.rotary_base == expected["rope_theta"]
    linear = expected.get("rope_type") == "linear"
    assert found.interpolation == (expected["factor"] if linear else None)


def test_a_single_file_wins_over_an_older_index(tmp_path):
    """The shards of a stale index were imported, or missed, beside a newer model.safetensors."""
    save_family("llama2", tmp_path, shard_size="1GB")
    tensors = load_file(tmp_path / SINGLE)
    old = "model-00001-of-00001.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, tmp_path / old)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, old)}))
    name = "model.norm.weight"
    assert torch.equal(ShardReader(tmp_path).read(name), tensors[name])
    (tmp_path / old).unlink()
    assert torch.equal(ShardReader(tmp_path).read(name), tensors[name])


def test_an_adapter_beside_the_weights_is_none_of_them(tmp_path):
    """A stray adapter file was refused as a tensor that the model has not."""
    save_family("llama2", tmp_path, shard_size="1GB")
    shutil.move(tmp_path / SINGLE, tmp_path / "weights.safetensors")
    save_file({"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "lora_A" not in ShardReader(tmp_path).shapes
