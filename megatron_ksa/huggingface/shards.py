"""Safetensors shards of a Hugging Face checkpoint: read one tensor at a time, written one shard at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES
from megatron_ksa.huggingface.weight_files import INDEX, SINGLE, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _cut_tensor(shard: Path) -> str | None:
    """What the header of a shard that was cut short says of the first tensor that is not whole, if it can be read."""
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size, LIST_BYTES)))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
            first, last = entry["data_offsets"]
            have = min(max(size - 8 - length - first, 0), last - first)
            if have < last - first:
                return f"{name} of shape {tuple(entry['shape'])} has {have:,} of its {last - first:,} bytes"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return None


class ShardReader:
    """Tensors of a checkpoint folder by name; a tensor is read from its shard when it is asked for.

    Attributes:
        shapes: shape of every tensor in the folder.
        dtypes: dtype of every tensor.
        left_out: names of other weights in the folder, which are not read (`weight_files`).

    Raises:
        UsageError: no safetensors files, a truncated or missing shard, a tensor twice, or a dtype that is no float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._shard: dict[str, Path] = {}
        shards, self.left_out = weight_files(folder)
        for shard in shards:
            self._read_header(shard)

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in self._shard:
                        raise UsageError(f"{name} is in {self._shard[name].name} and in {shard.name}")
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UsageError(f"{shard}: {name} is {part.get_dtype()}, only {', '.join(DTYPES)} are known")
                    self._shard[name] = shard
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = DTYPES[part.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{shard} is not a whole safetensors file: {_cut_tensor(shard) or error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, which must be among `shapes`."""
        with safe_open(self._shard[name], "pt") as file:
            return file.get_tensor(name)


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Divide tensors, in their order, into shards of at most max_bytes, or of one tensor where that is larger.

    Args:
        sizes: bytes of each tensor.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], max_bytes: int) -> None:
    """Write shards, and their index where there are several, under the names that the transformers library looks for.

    Args:
        tensors: names and tensors in the order of `sizes`; only those of the running shard are kept.
    """
    plan = plan_shards(sizes, max_bytes)
    names = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        names = [SINGLE]
    stream = iter(tensors)
    for name, members in zip(names, plan, strict=True):
        _write_shard(folder / name, stream, len(members))
    if len(plan) > 1:
        weight_map = {key: name for name, members in zip(names, plan, strict=True) for key in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, stream: Iterator[tuple[str, Tensor]], count: int) -> None:
    """Write the next tensors; a function of its own, so that they are gone before the next shard is gathered."""
    shard = {key: _own(tensor) for key, tensor in (next(stream) for _ in range(count))}
    save_file(shard, path, metadata={"format": "pt"})


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a part of a larger one would keep that alive, and the format refuses it."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
