"""transformers and this project give the same logits for the same checkpoint, in both directions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, GOLDEN, LENGTH, VOCABULARY, save_family
from transformers import AutoModelForCausalLM
from warm import run_script

from megatron_ksa.checkpoint.load import find_checkpoint, load_model
from megatron_ksa.platform import trainer_defaults

TOLERANCE = 1e-4
TOKENS = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def megatron_logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model = load_model(find_checkpoint(folder), trainer_defaults(), torch.float32)
    with torch.no_grad():
        return model(tokens, None)


def transformers_logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.std() > 0.1  # otherwise nothing is compared
    assert (actual - expected).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def imported(to_megatron, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face and Megatron folder of every family."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        save_family(name, root / name / "hf")
    return {name: (root / name / "hf", to_megatron(root / name / "hf", root / name / "megatron")) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_import_at_tensor_parallel_1(family, imported):
    huggingface, megatron = imported[family]
    assert_near(megatron_logits(megatron), transformers_logits(huggingface))


@pytest.mark.slow
def test_import_at_tensor_parallel_2(imported, to_megatron, to_huggingface, tmp_path):
    torch.save(TOKENS, tmp_path / "tokens.pt")
    ksa = to_megatron(GOLDEN, tmp_path / "ksa")
    pairs = [*imported.values(), (to_huggingface(ksa, tmp_path / "exported"), ksa)]
    folders = [str(megatron) for _, megatron in pairs]
    worker = str(Path(__file__).with_name("tensor_parallel_logits.py"))
    done = run_script(worker, tmp_path / "tokens.pt", tmp_path / "logits.pt", *folders, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    for huggingface, megatron in pairs:
        assert_near(found[str(megatron)], transformers_logits(huggingface))


def test_released_ksa(to_megatron, to_huggingface, tmp_path):
    """The released implementation's own logits, from this project and from the exported modelling file."""
    tokens = torch.tensor(np.load(GOLDEN / "input_ids.npy"))
    expected = torch.tensor(np.load(GOLDEN / "logits.npy"))
    megatron = to_megatron(GOLDEN, tmp_path / "megatron")
    assert (megatron_logits(megatron, tokens) - expected).abs().max() < TOLERANCE
    exported = to_huggingface(megatron, tmp_path / "hf")
    assert (transformers_logits(exported, tokens) - expected).abs().max() < TOLERANCE
