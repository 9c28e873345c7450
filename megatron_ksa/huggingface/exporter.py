"""Megatron distributed checkpoint, of any parallel layout -> Hugging Face checkpoint, one shard at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.streaming import DistributedReader, Slot
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface import modeling
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.companions import copy_companions
from megatron_ksa.huggingface.config_json import OWN_FILES, OWN_MODEL_TYPE, family, write_config
from megatron_ksa.huggingface.shards import write_shards
from megatron_ksa.huggingface.tensors import UNUSED, Group, groups
from megatron_ksa.huggingface.training_flags import architecture_of

# Where the model's tensors are; optimizer states have prefixes of their own.
MODEL = ("embedding.", "summary_embedding.", "decoder.", "output_layer.", "mtp.")
# Code of the released models.
RELEASED_CODE = ("modeling_qwen3sa*.py",)


def _architecture(stored: StoredCheckpoint, reader: DistributedReader, vocab_size: int | None) -> Architecture:
    """The model, with what only the stored tensors tell."""
    arch = architecture_of(stored)
    if vocab_size is not None:
        if not 0 < vocab_size <= arch.padded_vocab_size:
            raise UsageError(f"--vocab-size {vocab_size}: the embedding has {arch.padded_vocab_size} rows")
        arch = dataclasses.replace(arch, vocab_size=vocab_size)
    if any(key.startswith(UNUSED) and "linear_qkv_summary" in key for key in reader.tensors):
        arch = dataclasses.replace(arch, spare_projections=not arch.ksa.independent_projections)
    return arch


def _check_tensors(reader: DistributedReader, plan: list[Group]) -> None:
    """The checkpoint holds exactly the model that its arguments describe.

    Raises:
        UsageError: the first tensor that is missing or left over.
    """
    slots = {slot.key: slot for group in plan for slot in group.megatron}
    for key, slot in slots.items():
        if not key.startswith(UNUSED):
            reader.dtype(slot)
    for key in sorted(reader.tensors.keys() - {reader.name(slot) for slot in slots.values()}):
        if key.startswith(MODEL):
            raise UsageError(
                f"{reader.folder} has the tensor {key} of shape {tuple(reader.tensors[key].size)} "
                f"that its arguments do not describe"
            )


def _read(reader: DistributedReader, slot: Slot, dtype: torch.dtype) -> Tensor:
    """A slot's tensor; zeros for unused rows that a trained checkpoint no longer has."""
    if slot.key.startswith(UNUSED) and slot.key not in reader.tensors:
        return torch.zeros(slot.tensor_shape, dtype=dtype)
    return reader.read(slot)


def _tensors(reader: DistributedReader, plan: list[Group]) -> Iterator[tuple[str, Tensor]]:
    for group in plan:
        dtype = reader.dtype(group.megatron[0])
        tensors = group.to_huggingface([_read(reader, slot, dtype) for slot in group.megatron])
        yield from zip(group.huggingface, tensors, strict=True)


def export_checkpoint(
    stored: StoredCheckpoint,
    output: Path,
    *,
    like: Path | None = None,
    vocab_size: int | None = None,
    released: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable = tqdm,
) -> Architecture:
    """Write the Hugging Face checkpoint of a Megatron checkpoint.

    Models that the transformers library does not have (KSA, HARPE) get the modelling files of `modeling/` beside them.

    Args:
        stored: from `find_checkpoint`.
        output: an empty folder.
        like: Hugging Face folder whose tokenizer files and special token ids are copied.
        vocab_size: rows of the embedding to keep; by default all, with Megatron's padding.
        released: write the configuration that the KSA authors' modelling code reads, and no modelling files; theirs
            are copied from `like` where they are there.
        max_shard_bytes: size of a shard.
        progress: makes the progress bar, as tqdm.

    Raises:
        UsageError: a model that cannot be exported, tensors that are missing or of another shape.
    """
    reader = DistributedReader(stored.folder)
    arch = _architecture(stored, reader, vocab_size)
    plan = list(groups(arch))
    _check_tensors(reader, plan)
    sizes = {
        name: torch.Size(shape).numel() * reader.dtype(group.megatron[0]).itemsize
        for group in plan
        for name, shape in group.huggingface.items()
    }
    dtype = str(reader.dtype(plan[0].megatron[0])).removeprefix("torch.")
    config = write_config(arch, dtype, released)
    if like is not None:
        copy_companions(like, output, config, arch, RELEASED_CODE if released else ())
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if family(arch) == OWN_MODEL_TYPE and not released:
        for name in OWN_FILES:
            shutil.copyfile(Path(modeling.__file__).parent / f"{name}.py", output / f"{name}.py")
    tensors = progress(_tensors(reader, plan), total=len(sizes), unit="tensor", desc="export")
    write_shards(output, tensors, sizes, max_shard_bytes)
    return arch
