"""Hugging Face checkpoint -> Megatron distributed checkpoint, one tensor at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ksa.checkpoint.load import RELEASE, TRACKER
from megatron_ksa.checkpoint.streaming import Slot, save_distributed
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.config_json import read_config
from megatron_ksa.huggingface.shards import ShardReader
from megatron_ksa.huggingface.tensors import Group, empty_objects, groups
from megatron_ksa.huggingface.training_flags import training_args

# Angles that old Llama checkpoints store; they follow from the configuration.
DERIVED = ".rotary_emb.inv_freq"


def _check_tensors(reader: ShardReader, arch: Architecture, plan: list[Group]) -> None:
    """The shards hold exactly the tensors that `config.json` describes.

    Raises:
        UsageError: the first tensor that is missing, left over or of another shape, with the shapes.
    """
    expected = {name: shape for group in plan for name, shape in group.huggingface.items()}
    for name, shape in expected.items():
        if name not in reader.shapes:
            raise UsageError(f"{reader.folder} lacks the tensor {name} of shape {shape} that its config.json describes")
        if reader.shapes[name] != shape:
            raise UsageError(f"{reader.folder}: {name} has shape {reader.shapes[name]}, its config.json says {shape}")
    for name in sorted(reader.shapes.keys() - expected.keys()):
        if name.endswith(DERIVED):
            continue
        if arch.tied and name == "lm_head.weight":
            _check_tied(reader)
            continue
        raise UsageError(
            f"{reader.folder} has the tensor {name} of shape {reader.shapes[name]} "
            f"that its config.json does not describe"
        )


def _check_tied(reader: ShardReader) -> None:
    """Some files repeat the embedding as the head; another head would be lost."""
    embedding, head = (reader.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not torch.equal(embedding, head):
        raise UsageError(f"{reader.folder}: tie_word_embeddings is on, but lm_head.weight is not the embedding")


def _slot_dtypes(reader: ShardReader, plan: list[Group]) -> dict[Slot, torch.dtype]:
    """Dtype of every slot.

    Raises:
        UsageError: tensors that are stored together have different dtypes.
    """
    dtypes: dict[Slot, torch.dtype] = {}
    by_key: dict[str, torch.dtype] = {}
    for group in plan:
        for slot in group.megatron:
            for name in group.huggingface:
                known = by_key.setdefault(slot.key, reader.dtypes[name])
                if reader.dtypes[name] != known:
                    raise UsageError(
                        f"{reader.folder}: {name} is {reader.dtypes[name]}, others of its kind are {known}: "
                        f"save all layers in one dtype"
                    )
            dtypes[slot] = by_key[slot.key]
    return dtypes


class _Converter:
    """Makes the tensor of a slot; keeps those of the running group only."""

    def __init__(self, reader: ShardReader, plan: list[Group]) -> None:
        self.reader = reader
        self.group_of = {slot: group for group in plan for slot in group.megatron}
        self.group: Group | None = None
        self.tensors: dict[Slot, Tensor] = {}

    def __call__(self, slot: Slot) -> Tensor:
        group = self.group_of[slot]
        if group is not self.group:
            self.tensors.clear()
            tensors = group.to_megatron([self.reader.read(name) for name in group.huggingface])
            self.group, self.tensors = group, dict(zip(group.megatron, tensors, strict=True))
        return self.tensors[slot]


def import_checkpoint(
    source: Path, output: Path, seq_length: int | None = None, progress: Callable = tqdm
) -> Architecture:
    """Write the Megatron checkpoint of a Hugging Face checkpoint, as a release: weights without optimizer.

    Args:
        source: folder with `config.json` and safetensors shards.
        output: an empty folder.
        seq_length: sequence length to store among the arguments; by default the model's positions.
        progress: makes the progress bar, as tqdm.

    Raises:
        UsageError: a checkpoint that is damaged or of another family; before anything is written.
    """
    arch = read_config(source, seq_length)
    reader = ShardReader(source)
    if arch.spare_projections and not any("_proj_summary." in name for name in reader.shapes):
        arch = dataclasses.replace(arch, spare_projections=False)
    plan = list(groups(arch))
    _check_tensors(reader, arch, plan)
    dtypes = _slot_dtypes(reader, plan)
    common = {"args": training_args(arch), "checkpoint_version": 3.0, "iteration": 0}
    folder = output / RELEASE
    folder.mkdir()
    convert = _Converter(reader, plan)
    with progress(total=len(dtypes), unit="tensor", desc="import") as bar:

        def make(slot: Slot) -> Tensor:
            bar.update()
            return convert(slot)

        save_distributed(folder, dtypes, make, common, empty_objects(arch))
    (output / TRACKER).write_text(RELEASE, encoding="utf-8")
    return arch
