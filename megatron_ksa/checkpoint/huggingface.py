"""Import of a released KSA checkpoint (Hugging Face layout) into the Megatron model.

The released layout is Qwen3's with `{q,k,v}_proj_summary` beside the usual projections and the summary embedding as
the last S rows of `model.embed_tokens.weight` (KSA report, arXiv 2604.24432).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_ksa.config.ksa import KSAConfig, LayerKind
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class ReleasedModel:
    """What `config.json` of a released KSA checkpoint says.

    Attributes:
        text_vocab: token ids that are text; the checkpoint's embedding has S more rows.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    norm_epsilon: float
    rotary_base: float
    tied: bool
    text_vocab: int
    ksa: KSAConfig


def read_config(folder: Path) -> ReleasedModel:
    """Read `config.json` of a released checkpoint.

    Raises:
        UsageError: the file is missing, broken, lacks a key, or has settings that this model does not know.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    try:
        if not config["use_summary_attention"]:
            raise UsageError(f"{path}: use_summary_attention is off: this is not a KSA checkpoint")
        for key, known in (
            ("summary_chunk_position_ids_type", "origin"),
            ("summary_token_position_ids_type", "last_chunk_slice_right"),
        ):
            if config[key] != known:
                raise UsageError(f"{path}: {key} is {config[key]!r}, only {known!r} is known")
        num_layers, mix = config["num_hidden_layers"], config.get("mix_coeff", 1.0)
        if mix not in (0, 1):
            raise UsageError(f"{path}: mix_coeff is {mix}: a half-annealed checkpoint cannot be imported, only 0 or 1")
        frequencies = config["summary_layer_freq"]
        if isinstance(frequencies, int):
            frequencies = [frequencies] * num_layers
        kinds = "".join(LayerKind.KSA if f else LayerKind.FULL for f in frequencies)
        windows = config["summary_sliding_chunk_num"]
        return ReleasedModel(
            num_layers=num_layers,
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            norm_epsilon=config["rms_norm_eps"],
            rotary_base=float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
            tied=config["tie_word_embeddings"],
            text_vocab=config["summary_token_begin"],
            ksa=KSAConfig(
                enabled=True,
                chunk_size=config["summary_chunk_size"],
                summary_tokens=config["summary_token_num"],
                window_chunks=windows if isinstance(windows, str) else str(windows),
                layer_pattern=kinds,
                independent_projections=bool(config["summary_independent_parameters"]) and mix == 1,
                independent_layernorm=bool(config["summary_independent_attention_layernorm"]),
            ),
        )
    except KeyError as error:
        raise UsageError(f"{path} lacks the key {error}: this is not a released KSA checkpoint") from None


def _tensor_reader(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name from the safetensors shards of `folder`."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UsageError(f"{folder} holds no .safetensors file")
    where = {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as file:
                where.update(dict.fromkeys(file.keys(), shard))
        except SafetensorError as error:
            raise UsageError(f"{shard} is not a whole safetensors file: {error}") from None

    def read(name: str) -> Tensor:
        if name not in where:
            raise UsageError(f"{folder} lacks the tensor {name}")
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    return read


def _interleave_qkv(model: ReleasedModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron's `linear_qkv` rows: for each group its query heads, its key head, its value head."""
    groups = model.num_query_groups
    parts = [t.unflatten(0, (groups, -1)) for t in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def megatron_tensors(folder: Path, model: ReleasedModel) -> dict[str, Tensor]:
    """The checkpoint's tensors under Megatron's names (local layer spec, one tensor-parallel rank).

    Raises:
        UsageError: a missing tensor or a truncated shard.
    """
    read = _tensor_reader(folder)
    embedding = read("model.embed_tokens.weight")
    tensors = {
        "embedding.word_embeddings.weight": embedding[: model.text_vocab],
        "summary_embedding.weight": embedding[model.text_vocab : model.text_vocab + model.ksa.summary_tokens],
        "decoder.final_layernorm.weight": read("model.norm.weight"),
    }
    if not model.tied:
        tensors["output_layer.weight"] = read("lm_head.weight")[: model.text_vocab]
    names = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    for index, kind in enumerate(model.ksa.layer_pattern):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        for name, source in names.items():
            tensors[ours + name] = read(theirs + source)
        gate_up = [read(f"{theirs}mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[ours + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
        split_norm = kind == LayerKind.KSA and model.ksa.independent_layernorm
        norm = "input_layernorm.text.weight" if split_norm else "input_layernorm.weight"
        tensors[ours + norm] = read(theirs + "input_layernorm.weight")
        if split_norm:
            tensors[ours + "input_layernorm.summary.weight"] = read(theirs + "input_layernorm_summary.weight")
        suffixes = [""]
        if kind == LayerKind.KSA and model.ksa.independent_projections:
            suffixes.append("_summary")
        for suffix in suffixes:
            qkv = (read(f"{theirs}self_attn.{part}_proj{suffix}.weight") for part in "qkv")
            tensors[f"{ours}self_attention.linear_qkv{suffix}.weight"] = _interleave_qkv(model, *qkv)
    return tensors


def load_released_checkpoint(folder: Path, model: nn.Module) -> None:
    """Load a released checkpoint into a `KSAGPTModel` of one tensor- and pipeline-parallel rank.

    Raises:
        UsageError: tensors missing, left over or of another shape than the model's; the model is then unchanged.
    """
    tensors = megatron_tensors(folder, read_config(folder))
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        side = "the checkpoint lacks" if name in parameters else "the model has no"
        raise UsageError(f"{folder}: {side} {name}: check the KSA and model flags against its config.json")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UsageError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
