"""`config.json` of the supported families, to and from an `Architecture`.

| family | model_type | what is its own |
|---|---|---|
| Llama 2 and 3 | llama | Llama 3's frequency scaling |
| Qwen 2 and 2.5 | qwen2 | biases of Q, K and V |
| Qwen 3 | qwen3 | Q/K norm |
| released KSA | qwen3 with use_summary_attention | summary projections, summary rows of the embedding |
| this project's | megatron_ksa | any of these together, HARPE's bases; comes with a modelling file |
"""

import math
from pathlib import Path

from megatron_ksa.config.ksa import KSAConfig, LayerKind
from megatron_ksa.config.patterns import parse_integers
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.fields import REQUIRED, Fields
from megatron_ksa.huggingface.rotary_json import read_own_rotary, read_rotary, rotary_settings

OWN_MODEL_TYPE = "megatron_ksa"
# Modules of an exported model, which loads with transformers alone; the first two hold the classes of `auto_map`.
OWN_FILES = (
    "configuration_megatron_ksa", "modeling_megatron_ksa", "attention_megatron_ksa", "cache_megatron_ksa",
    "rows_megatron_ksa",
)  # fmt: skip
RELEASED_FAMILY = "qwen3"
FAMILIES = ("llama", "qwen2", "qwen3", OWN_MODEL_TYPE)
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What an absent key means to the transformers library, where that is a number; other sizes must be there.
DEFAULTS: dict[str, dict[str, object]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# Settings that change the computation and that the model here does not have: key -> the values it can take, of which
# the first is what an absent key means.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "transformers_weights": (None,),
    "summary_chunk_position_ids_type": ("origin",),
    "summary_token_position_ids_type": ("last_chunk_slice_right",),
}
# More than any model has; a list with an entry a layer must fit into memory before the tensors tell the number.
MAX_LAYERS = 10_000
# Chunks of a window over the whole sequence, longer than any.
EVERYTHING = 2**30


def read_config(folder: Path, seq_length: int | None = None) -> Architecture:
    """What `config.json` says about the model.

    Args:
        seq_length: length to train at; by default that of the checkpoint's positions.

    Raises:
        UsageError: another family, a missing key, or a setting that the model here does not have.
    """
    path = folder / "config.json"
    values = read_json(path)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{path}: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    config = Fields(values, path, defaults=DEFAULTS.get(family))
    for key, known in FIXED.items():
        if config.get(key, known[0]) not in known:
            raise config.refused(key, f"only {known[0]!r} is supported")
    if config.size("num_hidden_layers") > MAX_LAYERS:
        raise config.refused("num_hidden_layers", f"at most {MAX_LAYERS:,} are supported")
    kinds = config.get("layer_types", None)
    if kinds is not None and kinds != ["full_attention"] * config.size("num_hidden_layers"):
        raise config.refused("layer_types", "only full_attention in every layer is supported")
    try:
        arch = _architecture(config, family, seq_length)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path} has a value of the wrong type: {error}") from None
    try:
        _ = arch.layers
    except UsageError as error:
        raise UsageError(f"{path}: summary_layer_pattern or summary_sliding_chunk_num: {error}") from None
    if family == OWN_MODEL_TYPE and arch.ksa.enabled:
        # The modelling file reads these, the importer the patterns that they come from.
        for key in ("summary_layer_freq", "summary_windows"):
            if config.get(key) != _own_settings(arch)[key]:
                raise config.refused(
                    key, f"summary_layer_pattern and summary_sliding_chunk_num mean {_own_settings(arch)[key]}"
                )
    return arch


def _architecture(config: Fields, family: str, seq_length: int | None) -> Architecture:
    own, path = family == OWN_MODEL_TYPE, config.path
    layers, heads, rows = (config.size(key) for key in ("num_hidden_layers", "num_attention_heads", "vocab_size"))
    ksa, coefficient = KSAConfig(), 1.0
    if config.get("use_summary_attention", None) is not None and config.flag("use_summary_attention"):
        ksa, coefficient = _read_ksa(config, layers, own)
    vocab = rows - ksa.rows.summary_tokens
    if ksa.has_summaries and (config.get("summary_token_begin") != vocab or vocab < 1):
        raise UsageError(
            f"{path}: summary_token_begin is {config.get('summary_token_begin')}, the summary tokens must be the last "
            f"{ksa.rows.summary_tokens} of {rows} tokens"
        )
    groups = _query_groups(config, heads, own)
    positions = config.size("max_position_embeddings")
    step = ksa.chunk_size if ksa.enabled else 1
    if positions < step:
        raise config.refused("max_position_embeddings", f"at least a chunk of {step} tokens is needed")
    return Architecture(
        num_layers=layers,
        hidden_size=config.size("hidden_size"),
        ffn_hidden_size=config.size("intermediate_size"),
        num_heads=heads,
        num_query_groups=groups,
        head_dim=_head_dim(config, heads, family),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=positions,
        seq_length=seq_length or positions // step * step,
        norm_epsilon=config.number("rms_norm_eps"),
        tied=config.flag("tie_word_embeddings", False),
        qkv_bias=config.flag("qkv_bias") if own else family == "qwen2",
        qk_norm=config.flag("qk_norm") if own else family == "qwen3",
        ksa=ksa,
        summary_coefficient=coefficient,
        spare_projections=coefficient == 0.0,
        predicted_tokens=_predicted_tokens(config, rows, vocab) if ksa.enabled else None,
        **(read_own_rotary(config, groups) if own else read_rotary(config)),
    )


def _query_groups(config: Fields, heads: int, own: bool) -> int:
    """`num_key_value_heads`; in the transformers library's families null means one for each head."""
    key = "num_key_value_heads"
    groups = heads if config.get(key, REQUIRED if own else None) is None and not own else config.size(key)
    if heads % groups:
        raise config.refused(key, f"a divisor of num_attention_heads {heads} is needed")
    return groups


def _head_dim(config: Fields, heads: int, family: str) -> int:
    """`head_dim`; without one the hidden size is divided among the heads, and in Llama null means the same."""
    absent = None if family in ("llama", "qwen2") else REQUIRED
    if config.get("head_dim", absent) is None and (family == "llama" or "head_dim" not in config.values):
        hidden = config.size("hidden_size")
        if hidden % heads:
            raise config.refused("hidden_size", f"a multiple of num_attention_heads {heads} is needed, or a head_dim")
        return hidden // heads
    size = config.size("head_dim")
    if size % 2:
        raise config.refused("head_dim", "an even number is needed: channels are rotated in pairs")
    return size


def _read_ksa(config: Fields, layers: int, own: bool) -> tuple[KSAConfig, float]:
    """KSA settings, and the coefficient of the summary projections."""
    mix = _mix_coefficient(config, own)
    windows, pattern = config.get("summary_sliding_chunk_num"), config.get("summary_layer_pattern", None)
    if not isinstance(windows, int | str | list) or isinstance(windows, bool):
        raise config.refused("summary_sliding_chunk_num", "a number of chunks, a list or a pattern is needed")
    if not isinstance(pattern, str | None):
        raise config.refused("summary_layer_pattern", "a pattern of letters is needed")
    independent = config.flag("summary_independent_parameters")
    ksa = KSAConfig(
        enabled=True,
        chunk_size=config.size("summary_chunk_size"),
        summary_tokens=config.size("summary_token_num"),
        window_chunks=windows if isinstance(windows, str) else str(windows),
        layer_pattern=pattern or _layer_kinds(config, layers),
        independent_projections=independent and mix > 0,
        independent_qk_norm=config.flag("summary_independent_qk_norm", False),
        independent_layernorm=config.flag("summary_independent_attention_layernorm", False),
        initial_coefficient=mix if independent and mix < 1 else None,
    )
    return ksa, mix if independent else 1.0


def _mix_coefficient(config: Fields, own: bool) -> float:
    """`mix_coeff`, a number in [0, 1]; 1 where it is absent. Released files may have it as a string or null."""
    given = config.get("mix_coeff", 1.0)
    try:
        mix = float(1.0 if given is None and not own else given)
    except (TypeError, ValueError, OverflowError):
        mix = math.nan
    if isinstance(given, bool) or not 0 <= mix <= 1:
        raise config.refused("mix_coeff", "a number from 0 to 1 is needed")
    return mix


def _layer_kinds(config: Fields, layers: int) -> str:
    """The kind of each layer from `summary_layer_freq`: 1 for KSA, 0 for full attention.

    Absent, null, 0 and 1 mean KSA in all layers; otherwise a list, or a pattern such as "[1]*3+[0]", which is parsed.
    """
    key = "summary_layer_freq"
    given = config.get(key, None)
    if given is None or (type(given) is int and given in (0, 1)):
        return LayerKind.KSA * layers
    if isinstance(given, str):
        name = f"{config.path}: {key}"
        given = [1] * layers if given.strip() in ("0", "1") else list(parse_integers(given, layers, name))
    if not isinstance(given, list) or len(given) != layers or any(one not in (0, 1) for one in given):
        raise config.refused(key, f"a list of {layers} times 0 or 1 is needed, or such a pattern")
    return "".join(LayerKind.KSA if one else LayerKind.FULL for one in given)


def _predicted_tokens(config: Fields, rows: int, vocab: int) -> int | None:
    """`truncate_predict_nums`, beyond which logits are cut; 0 where nothing is cut, None for those of text tokens."""
    given = config.get("truncate_predict_nums", None)
    if given is not None and (type(given) is not int or not 0 <= given <= rows):
        raise config.refused("truncate_predict_nums", f"a number of tokens up to {rows} is needed")
    return None if given == vocab else given


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
        return config | rotary_settings(arch) | _released_settings(arch)
    return config | (_own_settings(arch) if kind == OWN_MODEL_TYPE else rotary_settings(arch))


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
        "window layers without summaries (w)": any(layer.kind == LayerKind.WINDOW for layer in arch.layers),
    }
    for what in (what for what, found in refused.items() if found):
        raise UsageError(f"--format released: the released code does not have {what}: use --format transformers")


def _released_settings(arch: Architecture) -> dict[str, object]:
    """Summary attention as the released code's configuration spells it."""
    windows: object = arch.ksa.window_chunks
    if LayerKind.LARGE_WINDOW in arch.ksa.layer_pattern:
        # The released code has no layer kind l: its window is written as a number of chunks that covers every position.
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
        "summary_layer_freq": [int(layer.has_summaries) for layer in arch.layers],
        "summary_chunk_position_ids_type": "origin",
        "summary_token_position_ids_type": "last_chunk_slice_right",
        "summary_independent_parameters": arch.ksa.independent_projections or arch.spare_projections,
        "summary_independent_attention_layernorm": arch.ksa.independent_layernorm,
        "mix_coeff": arch.summary_coefficient,
        "truncate_predict_nums": arch.vocab_size if predicted is None else predicted,
    }


def _own_settings(arch: Architecture) -> dict[str, object]:
    configuration, modeling, *_ = OWN_FILES
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
        "summary_layer_kinds": [str(layer.kind) for layer in arch.layers],
        "summary_windows": [
            EVERYTHING if layer.kind == LayerKind.LARGE_WINDOW else layer.window_chunks for layer in arch.layers
        ],
        "summary_independent_qk_norm": arch.ksa.independent_qk_norm,
        **_summary_settings(arch),
        # This project's code never has logits of summary tokens.
        "truncate_predict_nums": arch.predicted_tokens or arch.vocab_size,
    }
