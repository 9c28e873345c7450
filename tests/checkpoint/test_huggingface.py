import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from single_process import build_model, transformer_config

from megatron_ksa.checkpoint.huggingface import load_released_checkpoint, read_config
from megatron_ksa.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "ksa_hf_tiny"


def released_model(folder):
    """The model that a released checkpoint's config.json describes, with random weights."""
    released = read_config(folder)
    config = transformer_config(
        num_layers=released.num_layers,
        hidden_size=released.hidden_size,
        ffn_hidden_size=released.ffn_hidden_size,
        num_attention_heads=released.num_heads,
        num_query_groups=released.num_query_groups,
        kv_channels=released.head_dim,
        layernorm_epsilon=released.norm_epsilon,
    )
    return build_model(
        released.ksa,
        config,
        vocab_size=released.text_vocab,
        rotary_base=released.rotary_base,
        share_embeddings_and_output_weights=released.tied,
    )


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    return folder


def test_logits_of_the_released_implementation():
    model = released_model(GOLDEN).eval()
    load_released_checkpoint(GOLDEN, model)
    with torch.no_grad():
        logits = model(torch.tensor(np.load(GOLDEN / "input_ids.npy")), None)
    expected = torch.tensor(np.load(GOLDEN / "logits.npy"))
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-4


def test_truncated_shard_is_refused(copy):
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="model.safetensors is not a whole"):
        load_released_checkpoint(copy, released_model(GOLDEN))


def test_other_shape_is_refused_and_changes_nothing(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    model = released_model(copy)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=r"linear_fc1.weight has shape \(192, 64\), the model's is \(256, 64\)"):
        load_released_checkpoint(copy, model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix_coeff": 0.5}, "mix_coeff is 0.5"),
        ({"use_summary_attention": False}, "not a KSA checkpoint"),
        ({"summary_chunk_position_ids_type": "other"}, "only 'origin' is known"),
    ],
)
def test_unknown_settings_are_refused(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        read_config(copy)
