"""Fields of `config.json`: the importer reads each as AutoConfig of transformers does, or refuses it by its name."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers import logging as transformers_logging

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.config_json import read_config, write_config
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What every family's file has.
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "pretraining_tp": 1, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    "layer_types": ["full_attention"] * 3, "initializer_range": 0.02, "partial_rotary_factor": 1.0,
    "per_layer_config": None, "quantization_config": None, "transformers_weights": None, "use_summary_attention": False,
}  # fmt: skip
# Rotary positions, in transformers' layout before version 5 and since.
ROTARY = {
    "base outside": {"rope_theta": 20000.0, "rope_scaling": None},
    "linear": {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "base inside": {"rope_theta": 20000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "since 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "since 5, linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
    "since 5, llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "both": {
        "rope_theta": 30000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    },
}  # fmt: skip
# Fields that are about training or generation, or that act together with others alone: nothing reads them.
UNREAD = ("attention_dropout", "initializer_range", "max_window_layers", "sliding_window")
NAN, ENDLESS, LONG = float("nan"), float("inf"), 10**400
# Values that a field does not have: numbers as text, flags as numbers, zeros, and settings that change the model.
WRONG = {
    "num_key_value_heads": [0, 3, 8, True, "2", 2.0, -2],
    "num_attention_heads": [0, "4"],
    "head_dim": [0, 7, 8.0, "8", -8],
    "rms_norm_eps": ["1e-5", NAN, ENDLESS, -1.0, 0.0, True, LONG],
    "tie_word_embeddings": ["false", 1, 0],
    "attention_bias": [True, 1, "false"],
    "mlp_bias": [True, "false"],
    "use_sliding_window": [True, "false"],
    "layer_types": [
        ["full_attention", "sliding_attention", "full_attention"],
        ["full_attention"] * 2,
        "full_attention",
    ],
    "hidden_act": ["gelu", "relu2"],
    "partial_rotary_factor": [0.5],
    "rope_theta": [0, -1.0, NAN, ENDLESS, "10000", True, LONG, 10000.5],
    "factor": [0, NAN, ENDLESS, "2", True, LONG],
    "original_max_position_embeddings": [4096],
    "rope_type": ["yarn", "dynamic", None, "longrope"],
    "rope_scaling": ["linear", ["linear", 2.0], {"full_attention": {"rope_theta": 5e3}}],
    "rope_parameters": [5, {"full_attention": {"rope_type": "default", "rope_theta": 5e3}}],
    "per_layer_config": [{"0": {"intermediate_size": 96}}],
    "quantization_config": [{"bits": 4}],
    "transformers_weights": ["other.safetensors"],
    "use_summary_attention": ["false", 1],
}


@pytest.fixture(autouse=True)
def quiet():
    """The library says of each wrong field more than this test does."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


def fields(config: dict) -> list[tuple[str, ...]]:
    """Paths of all fields, those of objects inside too."""
    inner = [(key, name) for key, value in config.items() if isinstance(value, dict) for name in value]
    return [(key,) for key in config if key != "model_type"] + inner


def changed(config: dict, field: tuple[str, ...], *value: object) -> dict:
    """The configuration with another value of a field, or without it."""
    config = json.loads(json.dumps(config))
    place = config if len(field) == 1 else config[field[0]]
    place.pop(field[-1], None)
    if value:
        place[field[-1]] = value[0]
    return config


def of_transformers(config: AutoConfig) -> dict:
    """What the library read, under the names of an `Architecture`."""
    rotary, kind = config.rope_parameters, config.rope_parameters["rope_type"]
    if kind == "llama3":
        assert {name: rotary[name] for name in LLAMA3 if name != "factor"} == {
            name: value for name, value in LLAMA3.items() if name != "factor"
        }
    assert config.hidden_act == "silu" and not getattr(config, "attention_bias", False)
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    hidden_per_head = config.hidden_size // config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        # As the models read it.
        "head_dim": getattr(config, "head_dim", hidden_per_head),
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "rotary_base": rotary["rope_theta"],
        "rotary_percent": rotary.get("partial_rotary_factor", 1.0),
        "interpolation": rotary["factor"] if kind == "linear" else None,
        "rope_scaling_factor": rotary["factor"] if kind == "llama3" else None,
    }


def of_own(config: MegatronKSAConfig) -> dict:
    """The same of this project's configuration."""
    names = {
        "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size", "num_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads", "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps", "tied": "tie_word_embeddings", "interpolation": "rotary_interpolation",
        "rope_scaling_factor": "rotary_llama3_factor", "summary_coefficient": "mix_coeff",
    }  # fmt: skip
    same = ("hidden_size", "head_dim", "qkv_bias", "qk_norm", "rotary_base", "rotary_percent", "rotary_interleaved")
    found = {name: getattr(config, names.get(name, name)) for name in (*names, *same)}
    summaries = config.summary_token_num if config.use_summary_attention else 0
    bases = config.rotary_bases
    return found | {"vocab_size": config.vocab_size - summaries, "bases": None if bases is None else tuple(bases)}


def mistakes(folder: Path, config: dict, field: tuple[str, ...], read, told) -> list[str]:
    """What is wrong with the importer's reading, if anything."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        expected = told(read(folder))
    except Exception:  # noqa: BLE001 (whatever the library raises, it does not load this file)
        expected = None
    label = f"{field} of {config['model_type']}"
    try:
        arch = read_config(folder)
    except UsageError as error:
        line = str(error).removeprefix(str(folder))
        # A field may be refused together with the one that holds it, or that it belongs to.
        named = field[-1] in line or field[0] in line
        return [] if named and "\n" not in line and "wrong type" not in line else [f"{label}: refused as {line}"]
    if expected is None:
        return [] if field[-1] in UNREAD else [f"{label}: transformers refuses it, read was {arch}"]
    return [
        f"{label}: {name} is {value!r} to transformers, {getattr(arch, name)!r} here"
        for name, value in expected.items()
        if getattr(arch, name) != value
    ]


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fields_are_what_transformers_reads(family, rotary, tmp_path):
    """An absent num_key_value_heads or head_dim of Qwen was read as another than its default, null norms as norms."""
    config = {"model_type": family, **SIZES, **ROTARY[rotary]}
    found = []
    for field in fields(config):
        cases = [config, changed(config, field), changed(config, field, None)]
        cases += [changed(config, field, value) for value in WRONG.get(field[-1], ())]
        for case in cases:
            found += mistakes(tmp_path, case, field, AutoConfig.from_pretrained, of_transformers)
    assert not found, "\n".join(dict.fromkeys(found))
    assert read_config(write(tmp_path, config)).rotary_base > 10000


OWN = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_query_groups=2, head_dim=8, vocab_size=64,
    padded_vocab_size=64, max_positions=256, seq_length=256, norm_epsilon=1e-6, rotary_base=10000, tied=False,
    qk_norm=True, qkv_bias=True, bases=(1e4, 123456.7), rotary_percent=0.5, rotary_interleaved=True,
    ksa=KSAConfig(enabled=True, layer_pattern="kklf", independent_layernorm=True, independent_qk_norm=True),
)  # fmt: skip
OWN_WRONG = {
    "rotary_bases": [[1e4], [1e4, 0.0], [1e4, "5e5"], 1e4, [1e4, NAN]],
    "rotary_percent": [0, 1.5, "1"],
    "rotary_interleaved": ["false", 0],
    "rotary_llama3_factor": [0, "8"],
    "rotary_interpolation": [0, 1.5],
    "summary_windows": [[1, 2, 3, 4]],
    "summary_layer_freq": [[1, 1, 0, 0]],
    "summary_chunk_size": ["8", 0],
    "qk_norm": ["false", 1],
    "summary_independent_parameters": ["false"],
    "summary_token_begin": [63],
    "summary_sliding_chunk_num": [True, 1.5, "[1]*3", "x"],
    "summary_layer_pattern": [5, "kk", "kkxf", ["k"]],
    "mix_coeff": [2, "half", LONG],
}


def test_own_fields_are_what_its_configuration_reads(tmp_path):
    """A null or absent size of this project's own files was read otherwise than its modelling file reads it."""
    config = json.loads(json.dumps(write_config(OWN, "float32")))
    found = []
    for field in fields(config):
        cases = [config, changed(config, field), changed(config, field, None)]
        cases += [changed(config, field, value) for value in (WRONG | OWN_WRONG).get(field[-1], ())]
        for case in cases:
            found += mistakes(tmp_path, case, field, MegatronKSAConfig.from_pretrained, of_own)
    assert not found, "\n".join(dict.fromkeys(found))
    assert read_config(write(tmp_path, config)) == OWN


def write(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder
