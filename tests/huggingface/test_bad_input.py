"""Bad checkpoints cost one line that names the tensor and both shapes, exit code 2, and leave nothing behind."""

import json
import shutil

import pytest
import torch
from models import GOLDEN, read_tensors, save_family
from safetensors.torch import save_file

from megatron_ksa.checkpoint.load import RELEASE, find_checkpoint
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.exporter import export_checkpoint
from megatron_ksa.huggingface.importer import import_checkpoint

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    """A whole Qwen 3 checkpoint in one file."""
    save_family("qwen3", tmp_path / "hf", shard_size="1GB")
    return tmp_path / "hf"


def refused(source, tmp_path, message):
    """Import raises `message` before it writes anything."""
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(UsageError, match=message):
        import_checkpoint(source, output)
    assert list(output.iterdir()) == []


def change_tensors(folder, change):
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), r"lacks the tensor model.layers.1.self_attn.q_proj.weight of shape \(64, 32\)"),
        (lambda t: t.update({Q: t[Q][:32].clone()}), rf"{Q} has shape \(32, 32\), its config.json says \(64, 32\)"),
        (lambda t: t.update(extra=torch.zeros(2, 3)), r"has the tensor extra of shape \(2, 3\) that its config.json"),
        (lambda t: t.update({Q: t[Q].bfloat16()}), r"weight is torch.bfloat16, others of its kind are torch.float32"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), r"q_proj.weight is I8, only F64, F32, BF16, F16 are known"),
    ],
)
def test_tensors(change, message, source, tmp_path):
    change_tensors(source, change)
    refused(source, tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported, only llama, qwen2, qwen3, megatron_ksa"),
        ({"num_hidden_layers": 2, "layer_types": None}, "has the tensor model.layers.2"),
        # Lists with an entry a layer filled the memory.
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, at most 10,000 are supported"),
        ({"intermediate_size": 64}, r"gate_proj.weight has shape \(48, 32\), its config.json says \(64, 32\)"),
        ({"hidden_size": "32"}, "hidden_size is '32', a positive integer is needed"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True, only False is supported"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        # To the transformers library a model in which each token sees the whole sequence.
        ({"is_causal": False}, "is_causal is False, only True is supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}},
            "rope_type of rope_parameters is 'yarn', only default, linear and llama3 are supported",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "type of rope_scaling is 'dynamic', only default",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 8192}},
            "low_freq_factor of rope_parameters is 2.0, only 1.0 is supported",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 1.5}}, "an integer is needed"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of rope_parameters is 0.5",
        ),
    ],
)  # fmt: skip
def test_settings(change, message, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    refused(source, tmp_path, message)


def test_missing_key(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config.pop("rms_norm_eps")
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, "config.json lacks the key 'rms_norm_eps'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix_coeff": 1.5}, "mix_coeff is 1.5, a number from 0 to 1 is needed"),
        ({"mix_coeff": "half"}, "mix_coeff is 'half', a number from 0 to 1"),
        ({"mix_coeff": "nan"}, "mix_coeff is 'nan'"),
        ({"mix_coeff": True}, "mix_coeff is True"),
        ({"summary_layer_freq": [1, 0]}, r"summary_layer_freq is \[1, 0\], a list of 4 times 0 or 1"),
        ({"summary_layer_freq": "[1]*3+[2]"}, "a list of 4 times 0 or 1 is needed"),
        ({"summary_layer_freq": "__import__('os')"}, "summary_layer_freq .*grammar"),
        ({"summary_layer_freq": 3}, "summary_layer_freq is 3"),
        ({"truncate_predict_nums": 262}, "truncate_predict_nums is 262, a number of tokens up to 261"),
        ({"use_summary_attention": False}, r"has the tensor .*k_proj_summary.weight of shape \(32, 64\)"),
        ({"summary_chunk_position_ids_type": "other"}, "only 'origin' is supported"),
        ({"summary_token_begin": 7}, "summary_token_begin is 7, the summary tokens must be the last 1 of 261 tokens"),
    ],
)
def test_ksa_settings(change, message, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path / "hf", tmp_path, message)


def test_missing_shard(tmp_path):
    save_family("llama2", tmp_path / "hf")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "hf", tmp_path, f"lacks the shard {shard.name} that model.safetensors.index.json names")


@pytest.mark.parametrize("content", [b"", b"\xff" * 200, b"\x02" + b"\0" * 7 + b"[]"])
def test_shards_without_a_header(content, source, tmp_path):
    (source / "model.safetensors").write_bytes(content)
    refused(source, tmp_path, "model.safetensors is not a whole safetensors file: Error while deserializing")


def test_other_head_than_the_tied_embedding(tmp_path):
    save_family("llama3", tmp_path / "hf", shard_size="1GB")
    change_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(tmp_path / "hf", tmp_path, "lm_head.weight is not the embedding")


def test_pickled_weights_are_not_read(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path, "only pytorch_model.bin: other weights are not read, save them as safetensors")


def test_damaged_megatron_checkpoint(source, to_megatron, to_huggingface, tmp_path):
    megatron = to_megatron(source, tmp_path / "megatron")
    data = next((megatron / RELEASE).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="release: output_layer.weight cannot be read: /.*distcp is damaged: it ends"):
        to_huggingface(megatron, tmp_path / "truncated")
    data.write_bytes(b"")
    with pytest.raises(UsageError, match="release cannot be read: .*distcp is damaged: it has 0 of its"):
        to_huggingface(megatron, tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "LayerNorm"}, "only models with --normalization RMSNorm can be exported"),
        ({"num_experts": 8}, "only models with no --num-experts can be exported"),
        ({"position_embedding_type": "learned_absolute"}, "this one has learned_absolute"),
        ({"ffn_hidden_size": 64}, r"linear_fc1.weight has shape \(3, 96, 32\), its arguments say \(3, 128, 32\)"),
        ({"qk_layernorm": False}, r"has the tensor .*k_layernorm.weight of shape \(3, 16\) that its arguments"),
        ({"qk_layernorm": False, "add_qkv_bias": True}, r"lacks the tensor .*linear_qkv.bias of shape \(3, 128\)"),
    ],
)
def test_models_that_cannot_be_exported(change, message, source, to_megatron, tmp_path):
    stored = find_checkpoint(to_megatron(source, tmp_path / "megatron"))
    vars(stored.args).update(change)
    (tmp_path / "output").mkdir()
    with pytest.raises(UsageError, match=message):
        export_checkpoint(stored, tmp_path / "output")


def test_more_words_than_there_are(source, to_megatron, to_huggingface, tmp_path):
    megatron = to_megatron(source, tmp_path / "megatron")
    with pytest.raises(UsageError, match="--vocab-size 97: the embedding has 96 rows"):
        to_huggingface(megatron, tmp_path / "more", vocab_size=97)


def test_command_line(source, command, tmp_path):
    """One line, exit code 2, no output folder, nothing beside it."""
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = command("import", "--input", source, "--output", tmp_path / "output")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1
    assert "Traceback" not in done.stderr
    # 1000 bytes are missing: the 128 of model.norm.weight, and the rest of the tensor before it in the file.
    cut = "model.layers.2.self_attn.v_proj.weight of shape (32, 32) has 3,224 of its 4,096 bytes"
    assert f"model.safetensors is not a whole safetensors file: {cut}" in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
