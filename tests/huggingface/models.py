"""Tiny random checkpoints of every supported family, made with the transformers library."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden" / "ksa_hf_tiny"
VOCABULARY = 96
LENGTH = 64
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip


def _rope(base: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_theta": base, "rope_type": "default", **scaling}}


def _llama(**settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


FAMILIES = {
    "llama2": lambda: _llama(num_key_value_heads=4, **_rope(10000.0)),
    "llama2-linear": lambda: _llama(num_key_value_heads=4, **_rope(10000.0, rope_type="linear", factor=4.0)),
    "llama3": lambda: _llama(num_key_value_heads=2, tie_word_embeddings=True, **_rope(500000.0, **LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **_rope(1e6))
    ),
    "qwen2.5": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, **_rope(1e6))),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, **_rope(1e6))),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values, about 1 for vectors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + 0.3 * torch.randn(parameter.shape, generator=generator))


def save_family(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "20KB") -> None:
    """A checkpoint of the family with every parameter random, biases and norms too, in several shards."""
    model = FAMILIES[name]()
    randomise(model, len(name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def assert_same_tensors(actual: Path, expected: Path) -> None:
    """Same names, dtypes, shapes and bits."""
    first, second = read_tensors(actual), read_tensors(expected)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype and torch.equal(first[name], tensor), name
