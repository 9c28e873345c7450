"""Which files of a Hugging Face folder hold the model: those that the transformers library loads."""

import re
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# Other files that can hold a model's weights, or say where they are.
OTHERS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5",
          "*.msgpack", "*.ckpt")  # fmt: skip
# Names of files that hold no weights of the model: adapters, and what a trainer saves beside a model.
NO_WEIGHTS = ("adapter_", "optimizer", "scheduler", "scaler", "training_args", "rng_state")
_SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files to read, and names of other weights beside them, which are left out.

    As in the transformers library `model.safetensors` comes before an index, whatever their dates, an index before
    other files, and safetensors before pickled weights. Without those names, one index or all shards are taken.

    Raises:
        UsageError: no such files, or files of which no rule says which are meant; a link to a file that is not there.
    """
    links = [file for pattern in OTHERS for file in folder.glob(pattern) if file.is_symlink() and not file.exists()]
    for file in (folder / "config.json", *sorted(links)):
        if file.is_symlink() and not file.exists():
            raise UsageError(f"{file} is a link to {file.readlink()}, which is not there: fetch the model again")
    found = sorted({file for pattern in OTHERS for file in folder.glob(pattern) if file.is_file()})
    weights = [file for file in found if not file.name.startswith(NO_WEIGHTS)]
    shards = _chosen(folder, weights)
    read = {file.name for file in shards}
    adapters = [file for file in found if file.name.startswith("adapter_")]
    others = [file.name for file in (*weights, *adapters) if file.name != _index_of(shards, weights)]
    return shards, [name for name in others if name not in read]


def _chosen(folder: Path, weights: list[Path]) -> list[Path]:
    names = {file.name: file for file in weights}
    if SINGLE in names:
        return [names[SINGLE]]
    indexes = [file for file in weights if file.name.endswith(INDEX_SUFFIX)]
    if INDEX in names or len(indexes) == 1:
        return _indexed(names.get(INDEX) or indexes[0])
    if indexes:
        raise UsageError(
            f"{folder} has {len(indexes)} indexes, {indexes[0].name} and {indexes[1].name}, and no {INDEX}: give the "
            f"one that is meant this name"
        )
    shards = [file for file in weights if file.name.endswith(SUFFIX)]
    if not shards:
        pickled = next((file.name for file in weights), None)
        why = f", only {pickled}: other weights are not read, save them as safetensors" if pickled else ""
        if any(folder.glob("adapter_model.*")):
            why = ", only an adapter: merge it into its model first"
        if (folder / "snapshots").is_dir():
            why = ": it is the cache of a model, give a folder in its snapshots/"
        raise UsageError(f"{folder} holds no .safetensors file{why}")
    counts = {match[1]: file.name for file in shards if (match := _SHARD.fullmatch(file.name))}
    if len(counts) > 1:
        first, second = list(counts.values())[:2]
        raise UsageError(f"{folder} has shards of several checkpoints, {first} and {second}, and no index: remove one")
    return shards


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UsageError(f"{index} has no weight_map of tensors to file names")
    names = sorted(set(named.values()))
    missing = next((name for name in names if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise UsageError(f"{index.parent} lacks the shard {missing} that {index.name} names")
    return [index.parent / name for name in names]


def _index_of(shards: list[Path], weights: list[Path]) -> str | None:
    """The name of the index that led to the shards."""
    if any(file.name == SINGLE for file in shards):
        return None
    indexes = [file.name for file in weights if file.name.endswith(INDEX_SUFFIX)]
    return INDEX if INDEX in indexes else next(iter(indexes), None)
