"""Released KSA configurations as they come: read as their authors' code reads them, and written for it again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import GOLDEN, assert_same_tensors, read_tensors
from safetensors.torch import save_file

from megatron_ksa.checkpoint.load import find_checkpoint, load_model
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.config_json import read_config
from megatron_ksa.platform import trainer_defaults


def changed(folder: Path, change: dict, drop: tuple[str, ...] = ()) -> Path:
    """The golden checkpoint with another configuration."""
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return folder


def logits(megatron: Path) -> torch.Tensor:
    model = load_model(find_checkpoint(megatron), trainer_defaults(), torch.float32)
    with torch.no_grad():
        return model(torch.tensor(np.load(GOLDEN / "input_ids.npy")), None)


@pytest.mark.parametrize(
    ("change", "drop"),
    [
        ({}, ("summary_layer_freq",)),
        ({"summary_layer_freq": None}, ()),
        ({"summary_layer_freq": 0}, ()),
        ({"summary_layer_freq": "[1]*4"}, ()),
        ({"summary_layer_freq": "[1]*3+[1]"}, ()),
        ({"mix_coeff": "1.0"}, ()),
        ({}, ("mix_coeff",)),
        ({}, ("summary_independent_attention_layernorm",)),
        ({}, ("truncate_predict_nums",)),
        ({"truncate_predict_nums": 0}, ()),
    ],
    ids=str,
)
def test_spellings_of_one_model(change, drop, to_megatron, tmp_path):
    """Absent, null, 0 and patterns were refused, read as full attention, or read character by character."""
    megatron = to_megatron(changed(tmp_path / "hf", change, drop), tmp_path / "megatron")
    expected = torch.tensor(np.load(GOLDEN / "logits.npy"))
    assert (logits(megatron) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("given", "kinds"), [("[1]*3+[0]", "kkkf"), ([0, 1, 1, 0], "fkkf"), ("[1,0]*2", "kfkf")])
def test_hybrid_patterns(given, kinds, tmp_path):
    arch = read_config(changed(tmp_path / "hf", {"summary_layer_freq": given}))
    assert arch.ksa.layer_pattern == kinds


@pytest.mark.parametrize("mix", [0.25, "0.25"])
def test_half_annealed_checkpoints_come_back(mix, to_megatron, to_huggingface, tmp_path):
    """The project's own export of a model in the middle of its annealing was refused."""
    megatron = to_megatron(changed(tmp_path / "hf", {"mix_coeff": mix}), tmp_path / "megatron")
    stored = find_checkpoint(megatron)
    assert stored.settings.ksa.summary_coefficient(stored.iteration) == 0.25
    model = load_model(stored, trainer_defaults(), torch.float32)
    ids = torch.tensor(np.load(GOLDEN / "input_ids.npy"))
    with torch.no_grad():
        got = model(ids, None)
        model.set_summary_coefficient(1.0)
        assert (got - model(ids, None)).abs().max() > 1e-3
    back = to_huggingface(megatron, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["mix_coeff"] == 0.25
    assert_same_tensors(back, GOLDEN)
    assert torch.equal(logits(to_megatron(back, tmp_path / "again")), got)


def test_annealed_checkpoint_without_projections(to_megatron, to_huggingface, tmp_path):
    """mix_coeff 0 needs none: the same model as with them."""
    full = to_megatron(changed(tmp_path / "full", {"mix_coeff": 0}), tmp_path / "full megatron")
    source = changed(tmp_path / "hf", {"mix_coeff": 0})
    kept = {name: tensor for name, tensor in read_tensors(source).items() if "_proj_summary" not in name}
    save_file(kept, source / "model.safetensors")
    megatron = to_megatron(source, tmp_path / "megatron")
    assert torch.equal(logits(megatron), logits(full))
    back = to_huggingface(megatron, tmp_path / "back")
    assert_same_tensors(back, source)
    assert json.loads((back / "config.json").read_text())["mix_coeff"] == 0.0
    assert torch.equal(logits(to_megatron(back, tmp_path / "again")), logits(full))


@pytest.mark.parametrize("change", [{}, {"mix_coeff": 0.5}, {"mix_coeff": 0}, {"truncate_predict_nums": 200},
                                    {"truncate_predict_nums": 0}], ids=str)  # fmt: skip
def test_released_format(change, to_megatron, to_huggingface, tmp_path):
    """Every key that the released configuration has of summary attention, with its value, and the same tensors."""
    source = changed(tmp_path / "hf", change)
    (source / "modeling_qwen3sa.py").write_text("# the authors' code")
    exported = to_huggingface(to_megatron(source, tmp_path / "megatron"), tmp_path / "out", released=True, like=source)
    assert_same_tensors(exported, GOLDEN)
    assert {path.name for path in exported.glob("*.py")} == {"modeling_qwen3sa.py"}
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (exported, source))
    shared = [key for key in original if "summary" in key or key in ("mix_coeff", "truncate_predict_nums", "auto_map",
              "model_type", "architectures", "vocab_size", "rope_theta", "attention_bias", "head_dim")]  # fmt: skip
    assert {key: config[key] for key in shared} == {key: original[key] for key in shared}
    assert read_config(exported) == read_config(source)


def test_released_code_has_no_kind_l_and_no_harpe(to_megatron, tmp_path):
    import dataclasses

    from megatron_ksa.huggingface.config_json import write_config

    arch = read_config(changed(tmp_path / "hf", {}))
    ksa = dataclasses.replace(arch.ksa, layer_pattern="kklf", window_chunks="4")
    config = write_config(dataclasses.replace(arch, ksa=ksa), "float32", released=True)
    assert config["summary_sliding_chunk_num"] == [4, 4, 512, 4] and config["summary_layer_freq"] == [1, 1, 1, 0]
    with pytest.raises(UsageError, match="--format released: .*HARPE"):
        write_config(dataclasses.replace(arch, bases=(1e4, 1e5)), "float32", released=True)
