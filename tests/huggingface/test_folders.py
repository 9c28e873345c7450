"""Folders with files of several kinds: the ones that the transformers library takes are read, the others are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import save_family
from safetensors.torch import load_file, save_file

from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.shards import ShardReader
from megatron_ksa.huggingface.weight_files import INDEX, SINGLE, weight_files

NAME = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Llama checkpoint in one file."""
    folder = tmp_path_factory.mktemp("saved") / "hf"
    save_family("llama2", folder, shard_size="1GB")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "hf"))


def split(folder: Path, prefix: str, index: str | None, add: float = 0.0) -> dict[str, torch.Tensor]:
    """The model once more in two shards, with an index unless that is None; its tensors, which differ by `add`."""
    tensors = {name: tensor + add for name, tensor in load_file(folder / SINGLE).items()}
    names = [f"{prefix}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    if index is not None:
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_single_file_wins_over_an_index_of_any_date(folder):
    """As in the transformers library, which looks at no dates; the import says what it leaves out."""
    whole = load_file(folder / SINGLE)[NAME]
    split(folder, "model", INDEX, add=1.0)
    for file, time in ((SINGLE, 1), (INDEX, 2)):
        os.utime(folder / file, (time, time))
    reader = ShardReader(folder)
    assert torch.equal(reader.read(NAME), whole)
    assert reader.left_out == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]


def test_pickled_weights_beside_safetensors_are_left_out(folder):
    (folder / "pytorch_model.bin").write_bytes(b"newer")
    assert ShardReader(folder).left_out == ["pytorch_model.bin"]


def test_an_adapter_is_named(folder):
    """An adapter was left out without a word, and one alone in its folder was not mentioned."""
    shutil.copy(folder / SINGLE, folder / "adapter_model.safetensors")
    assert ShardReader(folder).left_out == ["adapter_model.safetensors"]
    (folder / SINGLE).unlink()
    with pytest.raises(UsageError, match="holds no .safetensors file, only an adapter: merge it into its model first"):
        ShardReader(folder)


def test_the_index_of_the_usual_name_wins(folder):
    tensors = split(folder, "model", INDEX)
    split(folder, "fp16", "model.fp16.safetensors.index.json", add=1.0)
    (folder / SINGLE).unlink()
    reader = ShardReader(folder)
    assert torch.equal(reader.read(NAME), tensors[NAME])
    assert "model.fp16.safetensors.index.json" in reader.left_out and INDEX not in reader.left_out


def test_two_indexes_of_other_names_are_refused(folder):
    """The shards of both were taken for one model."""
    split(folder, "a", "a.safetensors.index.json")
    (folder / SINGLE).unlink()
    assert not ShardReader(folder).left_out  # one index is no question
    shutil.copy(folder / "a.safetensors.index.json", folder / "b.safetensors.index.json")
    with pytest.raises(UsageError, match=r"has 2 indexes, a.*json and b.*json, and no model.safetensors.index.json"):
        ShardReader(folder)


def test_shards_of_two_checkpoints_without_an_index_are_refused(folder):
    split(folder, "model", None)
    (folder / SINGLE).unlink()
    assert len(weight_files(folder)[0]) == 2
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00003-of-00003.safetensors")
    with pytest.raises(
        UsageError, match="shards of several checkpoints, model-00001-of-00002.*and model-00003-of-00003"
    ):
        ShardReader(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": ["b"]}}, []])
def test_an_index_that_names_no_files_is_refused(index, folder):
    """A weight_map with a number or a list in it ended in a TypeError."""
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        UsageError, match="index.json (has no weight_map of tensors to file names|holds no JSON object)"
    ):
        ShardReader(folder)


@pytest.fixture
def cache(folder) -> Path:
    """A model as Hugging Face's cache holds it: a snapshot of links to blobs."""
    root = folder.parent / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_links_into_a_cache_are_followed(saved, cache, to_megatron, to_huggingface, tmp_path):
    """Models are imported from a snapshot, and `--like` copies files, not links."""
    (cache / "tokenizer.json").symlink_to("../../blobs/tokenizer")
    (cache.parents[1] / "blobs" / "tokenizer").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    megatron = to_megatron(cache, tmp_path / "megatron")
    back = to_huggingface(megatron, tmp_path / "back", like=cache)
    assert torch.equal(load_file(back / SINGLE)[NAME], load_file(saved / SINGLE)[NAME])
    copied = back / "tokenizer.json"
    assert copied.read_bytes() == (cache / "tokenizer.json").read_bytes() and not copied.is_symlink()


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_download_that_is_not_complete_is_refused(cache, name, command, tmp_path):
    """A link whose file is missing was passed over: another file, or none, was found in its place."""
    (cache / name).resolve().unlink()
    with pytest.raises(
        UsageError, match=f"{name} is a link to ../../blobs/0{{39}}.*which is not there: fetch the model"
    ):
        weight_files(cache)


def test_the_root_of_a_cache_is_refused_with_the_way(cache):
    with pytest.raises(UsageError, match="it is the cache of a model, give a folder in its snapshots/"):
        weight_files(cache.parents[1])
