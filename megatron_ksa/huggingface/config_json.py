"""`config.json` of the supported families, to and from an `Architecture`.

| family | model_type | what is its own |
|---|---|---|
| Llama 2 and 3 | llama | Llama 3's frequency scaling |
| Qwen 2 and 2.5 | qwen2 | biases of Q, K and V |
| Qwen 3 | qwen3 | Q/K norm |
| released KSA | qwen3 with use_summary_attention | summary projections, summary rows of the embedding |
| this project's | megatron_ksa | any of these together, HARPE's bases; comes with a modelling file |
"""

import json
import math
from pathlib import Path

from megatron_ksa.config.ksa import KSAConfig, LayerKind
from megatron_ksa.config.patterns import parse_integers
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small
from megatron_ksa.huggingface.architecture import Architecture

OWN_MODEL_TYPE = "megatron_ksa"
OWN_FILES = ("configuration_megatron_ksa", "modeling_megatron_ksa")
RELEASED_FAMILY = "qwen3"
FAMILIES = ("llama", "qwen2", "qwen3", OWN_MODEL_TYPE)
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
         "max_position_embeddings")  # fmt: skip
# Settings that change the computation and that the model here does not have: key -> the values it can take.
FIXED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "summary_chunk_position_ids_type": ("origin",),
    "summary_token_position_ids_type": ("last_chunk_slice_right",),
}
# Chunks of a window over the whole sequence, longer than any.
EVERYTHING = 2**30
# Llama 3's frequency scaling; Megatron takes the factor from its flags and has the others as constants.
# The index of the largest models has some megabytes.
MAX_JSON_BYTES = 100_000_000
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UsageError: a file that is missing or broken.
    """
    try:
        content = json.loads(read_small(path, limit=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object")
    return content


def read_config(folder: Path, seq_length: int | None = None) -> Architecture:
    """What `config.json` says about the model.

    Args:
        seq_length: length to train at; by default that of the checkpoint's positions.

    Raises:
        UsageError: another family, a missing key, or a setting that the model here does not have.
    """
    path = folder / "config.json"
    config = read_json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{path}: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    for key, known in FIXED.items():
        if config.get(key, known[0]) not in known:
            raise UsageError(f"{path}: {key} is {config[key]!r}, only {known[0]!r} is supported")
    if config.get("attention_bias", False):
        raise UsageError(f"{path}: attention_bias is on: a bias of the output projection is not supported")
    try:
        return _architecture(config, path, seq_length)
    except KeyError as error:
        raise UsageError(f"{path} lacks the key {error}") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} has a value of the wrong type: {error}") from None


def _architecture(config: dict, path: Path, seq_length: int | None) -> Architecture:
    own = config["model_type"] == OWN_MODEL_TYPE
    for key in SIZES:
        if type(config[key]) is not int or config[key] < 1:
            raise UsageError(f"{path}: {key} is {config[key]!r}, a positive integer is needed")
    heads = config["num_attention_heads"]
    ksa, coefficient = KSAConfig(), 1.0
    if config.get("use_summary_attention"):
        ksa, coefficient = _read_ksa(config, path)
    vocab = config["vocab_size"] - ksa.summary_tokens * ksa.enabled
    if ksa.enabled and config["summary_token_begin"] != vocab:
        raise UsageError(
            f"{path}: summary_token_begin is {config['summary_token_begin']}, the summary tokens must be the last "
            f"{ksa.summary_tokens} of {config['vocab_size']} tokens"
        )
    positions = config["max_position_embeddings"]
    step = ksa.chunk_size if ksa.enabled else 1
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=positions,
        seq_length=seq_length or positions // step * step,
        norm_epsilon=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bool(config["qkv_bias"]) if own else config["model_type"] == "qwen2",
        qk_norm=bool(config["qk_norm"]) if own else config["model_type"] == "qwen3",
        ksa=ksa,
        summary_coefficient=coefficient,
        spare_projections=coefficient == 0.0,
        predicted_tokens=_predicted_tokens(config, vocab, path) if ksa.enabled else None,
        **(_read_own_rotary(config) if own else _read_rotary(config, path)),
    )


def _read_ksa(config: dict, path: Path) -> tuple[KSAConfig, float]:
    """KSA settings, and the coefficient of the summary projections."""
    mix = _mix_coefficient(config, path)
    windows = config["summary_sliding_chunk_num"]
    independent = bool(config["summary_independent_parameters"])
    ksa = KSAConfig(
        enabled=True,
        chunk_size=config["summary_chunk_size"],
        summary_tokens=config["summary_token_num"],
        window_chunks=windows if isinstance(windows, str) else str(windows),
        layer_pattern=config.get("summary_layer_pattern") or _layer_kinds(config, path),
        independent_projections=independent and mix > 0,
        independent_qk_norm=bool(config.get("summary_independent_qk_norm", False)),
        independent_layernorm=bool(config.get("summary_independent_attention_layernorm", False)),
        initial_coefficient=mix if independent and mix < 1 else None,
    )
    return ksa, mix if independent else 1.0


def _mix_coefficient(config: dict, path: Path) -> float:
    """`mix_coeff`, a number in [0, 1], which may be written as a string; 1 where it is absent."""
    given = config.get("mix_coeff", 1.0)
    try:
        mix = float(1.0 if given is None else given)
    except (TypeError, ValueError):
        mix = math.nan
    if isinstance(given, bool) or not 0 <= mix <= 1:
        raise UsageError(f"{path}: mix_coeff is {given!r}, a number from 0 to 1 is needed")
    return mix


def _layer_kinds(config: dict, path: Path) -> str:
    """The kind of each layer from `summary_layer_freq`: 1 for KSA, 0 for full attention.

    Absent, null, 0 and 1 mean KSA in all layers; otherwise a list, or a pattern such as "[1]*3+[0]", which is parsed.
    """
    num_layers, given = config["num_hidden_layers"], config.get("summary_layer_freq")
    name = f"{path}: summary_layer_freq"
    if given is None or (type(given) is int and given in (0, 1)):
        return LayerKind.KSA * num_layers
    if isinstance(given, str):
        given = [1] * num_layers if given.strip() in ("0", "1") else list(parse_integers(given, num_layers, name))
    if not isinstance(given, list) or len(given) != num_layers or any(one not in (0, 1) for one in given):
        raise UsageError(f"{name} is {given!r}: a list of {num_layers} times 0 or 1 is needed, or such a pattern")
    return "".join(LayerKind.KSA if one else LayerKind.FULL for one in given)


def _predicted_tokens(config: dict, vocab: int, path: Path) -> int | None:
    """`truncate_predict_nums`, beyond which logits are cut; 0 where nothing is cut, None for those of text tokens."""
    given = config.get("truncate_predict_nums")
    if given is not None and (type(given) is not int or not 0 <= given <= config["vocab_size"]):
        raise UsageError(
            f"{path}: truncate_predict_nums is {given!r}, a number of tokens up to {config['vocab_size']} is needed"
        )
    return None if given == vocab else given


def _read_rotary(config: dict, path: Path) -> dict[str, object]:
    """Rotary settings, as the transformers library writes them since version 5 and before.

    Where both layouts stand in a file that library takes `rope_scaling` alone, and a base inside it before the one
    outside (`convert_rope_params_to_dict`).
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if int(base) != base:
        raise UsageError(f"{path}: rope_theta is {base}, an integer is needed (--rotary-base)")
    rotary: dict[str, object] = {"rotary_base": int(base)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{path}: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported, only 1")
    if kind == "llama3":
        for key, known in LLAMA3.items():
            if scaling[key] != known:
                raise UsageError(f"{path}: {key} of the rope scaling is {scaling[key]}, only {known} is supported")
        return rotary | {"rope_scaling_factor": float(scaling["factor"])}
    if kind == "linear":
        if int(scaling["factor"]) != scaling["factor"]:
            raise UsageError(f"{path}: factor of the linear rope scaling is {scaling['factor']}, an integer is needed")
        return rotary | {"interpolation": int(scaling["factor"])}
    if kind != "default":
        raise UsageError(f"{path}: rope scaling of type {kind!r} is not supported, only default, linear and llama3")
    return rotary


def _read_own_rotary(config: dict) -> dict[str, object]:
    bases = config["rotary_bases"]
    return {
        "rotary_base": config["rotary_base"],
        "rotary_percent": config["rotary_percent"],
        "rotary_interleaved": config["rotary_interleaved"],
        "rope_scaling_factor": config["rotary_llama3_factor"],
        "interpolation": config["rotary_interpolation"],
        "bases": None if bases is None else tuple(bases),
    }


def family(arch: Architecture) -> str:
    """The `model_type` to export as: the transformers library's own where it has the model."""
    plain = arch.rotary_percent == 1.0 and not arch.rotary_interleaved and arch.bases is None
    if arch.ksa.enabled or not plain or (arch.qkv_bias and arch.qk_norm):
        return OWN_MODEL_TYPE
    return "qwen3" if arch.qk_norm else "qwen2" if arch.qkv_bias else "llama"


def write_config(arch: Architecture, dtype: str, released: bool = False) -> dict[str, object]:
    """The content of `config.json`.

    Args:
        dtype: of the weights, such as bfloat16.
        released: for the KSA authors' modelling code in place of this project's.

    Raises:
        UsageError: a model that the released code does not have.
    """
    kind = RELEASED_FAMILY if released else family(arch)
    if released:
        _check_released(arch)
    config: dict[str, object] = {
        "architectures": [CLASSES.get(kind, "MegatronKSAForCausalLM")],
        "model_type": kind,
        "vocab_size": arch.vocab_size + arch.summary_rows,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied,
        "torch_dtype": dtype,
    }
    if released:
        return config | _rotary_settings(arch) | _released_settings(arch)
    return config | (_own_settings(arch) if kind == OWN_MODEL_TYPE else _rotary_settings(arch))


def _check_released(arch: Architecture) -> None:
    """Refuse what the released code, a Qwen 3 with summaries, does not have."""
    refused = {
        "a model without --ksa": not arch.ksa.enabled,
        "HARPE's bases": arch.bases is not None,
        "--rotary-percent other than 1": arch.rotary_percent != 1.0,
        "--rotary-interleaved": arch.rotary_interleaved,
        "a model without --qk-layernorm": not arch.qk_norm,
        "--add-qkv-bias": arch.qkv_bias,
        "--ksa-independent-qk-norm": arch.ksa.independent_qk_norm,
    }
    for what in (what for what, found in refused.items() if found):
        raise UsageError(f"--format released: the released code does not have {what}: use --format transformers")


def _released_settings(arch: Architecture) -> dict[str, object]:
    """Summary attention as the released code's configuration spells it."""
    windows: object = arch.ksa.window_chunks
    if LayerKind.LARGE_WINDOW in arch.ksa.layer_pattern:
        # It has no kind l: a number of chunks that covers every position.
        whole = -(-arch.max_positions // arch.ksa.chunk_size)
        windows = [whole if layer.kind == LayerKind.LARGE_WINDOW else layer.window_chunks for layer in arch.layers]
    return {
        "auto_map": {
            "AutoModel": "modeling_qwen3sa.Qwen3Model",
            "AutoModelForCausalLM": "modeling_qwen3sa.Qwen3ForCausalLM",
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_summary_attention": True,
        "summary_sliding_chunk_num": windows,
        **_summary_settings(arch),
    }


def _summary_settings(arch: Architecture) -> dict[str, object]:
    """Keys that the released configuration and this project's share."""
    predicted = arch.predicted_tokens
    return {
        "summary_chunk_size": arch.ksa.chunk_size,
        "summary_token_num": arch.ksa.summary_tokens,
        "summary_token_begin": arch.vocab_size,
        "summary_layer_freq": [int(layer.kind != LayerKind.FULL) for layer in arch.layers],
        "summary_chunk_position_ids_type": "origin",
        "summary_token_position_ids_type": "last_chunk_slice_right",
        "summary_independent_parameters": arch.ksa.independent_projections or arch.spare_projections,
        "summary_independent_attention_layernorm": arch.ksa.independent_layernorm,
        "mix_coeff": arch.summary_coefficient,
        "truncate_predict_nums": arch.vocab_size if predicted is None else predicted,
    }


def _rotary_settings(arch: Architecture) -> dict[str, object]:
    scaling = None
    if arch.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": arch.rope_scaling_factor, **LLAMA3}
    elif arch.interpolation is not None:
        scaling = {"rope_type": "linear", "factor": float(arch.interpolation)}
    return {"rope_theta": float(arch.rotary_base), "rope_scaling": scaling}


def _own_settings(arch: Architecture) -> dict[str, object]:
    configuration, modeling = OWN_FILES
    settings: dict[str, object] = {
        "auto_map": {
            "AutoConfig": f"{configuration}.MegatronKSAConfig",
            "AutoModelForCausalLM": f"{modeling}.MegatronKSAForCausalLM",
        },
        "qkv_bias": arch.qkv_bias,
        "qk_norm": arch.qk_norm,
        "rotary_base": arch.rotary_base,
        "rotary_bases": None if arch.bases is None else list(arch.bases),
        "rotary_percent": arch.rotary_percent,
        "rotary_interleaved": arch.rotary_interleaved,
        "rotary_llama3_factor": arch.rope_scaling_factor,
        "rotary_interpolation": arch.interpolation,
        "use_summary_attention": arch.ksa.enabled,
    }
    if not arch.ksa.enabled:
        return settings
    return settings | {
        "summary_sliding_chunk_num": arch.ksa.window_chunks,
        "summary_layer_pattern": arch.ksa.layer_pattern,
        "summary_windows": [
            EVERYTHING if layer.kind == LayerKind.LARGE_WINDOW else layer.window_chunks for layer in arch.layers
        ],
        "summary_independent_qk_norm": arch.ksa.independent_qk_norm,
        **_summary_settings(arch),
        # This project's code never has logits of summary tokens.
        "truncate_predict_nums": arch.predicted_tokens or arch.vocab_size,
    }
