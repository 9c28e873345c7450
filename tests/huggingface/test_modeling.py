"""Exported KSA and HARPE models in the transformers library: the logits of this project, whole and step by step."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import assert_same_tensors, randomise
from test_logits import TOLERANCE, assert_near, megatron_logits, transformers_logits
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from megatron_ksa.checkpoint.load import find_checkpoint, load_model
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.huggingface import modeling
from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.config_json import OWN_FILES, write_config
from megatron_ksa.huggingface.exporter import export_checkpoint
from megatron_ksa.huggingface.modeling.cache_megatron_ksa import SEGMENT, KSACache
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig
from megatron_ksa.huggingface.modeling.modeling_megatron_ksa import MegatronKSAForCausalLM
from megatron_ksa.platform import trainer_defaults

DENSE = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_query_groups=2, head_dim=8, vocab_size=64,
    padded_vocab_size=64, max_positions=60, seq_length=60, norm_epsilon=1e-6, rotary_base=10000, tied=False,
)  # fmt: skip
HARPE = dataclasses.replace(DENSE, bases=(1e3, 123456.7))
KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 3, 2]", layer_pattern="kklf")
MODELS = {
    "harpe": HARPE,
    "harpe, partial and interleaved": dataclasses.replace(
        HARPE, rotary_percent=0.5, rotary_interleaved=True, tied=True, qkv_bias=True
    ),
    "ksa, harpe, hybrid": dataclasses.replace(HARPE, ksa=KSA, qk_norm=True),
    "ksa, everything independent": dataclasses.replace(
        DENSE, tied=True, qk_norm=True, qkv_bias=True, rope_scaling_factor=32.0,
        ksa=dataclasses.replace(KSA, summary_tokens=2, independent_qk_norm=True, independent_layernorm=True),
    ),
    "ksa, everything shared": dataclasses.replace(
        DENSE, interpolation=2,
        ksa=dataclasses.replace(KSA, chunk_size=3, summary_tokens=4, independent_projections=False),
    ),
    "every kind of layer": dataclasses.replace(HARPE, ksa=dataclasses.replace(KSA, layer_pattern="wklf"), qk_norm=True),
    "windows alone": dataclasses.replace(DENSE, ksa=dataclasses.replace(KSA, layer_pattern="wwfw")),
}  # fmt: skip
TOKENS = torch.randint(1, 64, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=MODELS)
def folders(request, to_megatron, to_huggingface, tmp_path_factory) -> tuple[Path, Path]:
    """A Megatron checkpoint with random weights, and its export."""
    root, arch = tmp_path_factory.mktemp("model"), MODELS[request.param]
    config = write_config(arch, "float32")
    config.pop("auto_map")
    model = MegatronKSAForCausalLM(MegatronKSAConfig(**config))
    randomise(model, 1)
    model.save_pretrained(root / "random")
    megatron = to_megatron(root / "random", root / "megatron")
    exported = to_huggingface(megatron, root / "exported")
    if arch.tied or not arch.ksa.enabled:
        assert_same_tensors(exported, root / "random")
    return megatron, exported


def test_full_forward(folders):
    """60 tokens are no multiple of 8: windows that are passed, and a ragged chunk at the end of a shorter prompt."""
    megatron, exported = folders
    for length in (60, 59, 7, 1):
        tokens = TOKENS[:, :length]
        assert_near(transformers_logits(exported, tokens), megatron_logits(megatron, tokens))


@pytest.mark.parametrize("steps", [[1] * 60, [5, 1, 1, 30, 2, 21], [59, 1]])
def test_forward_in_steps(folders, steps):
    megatron, exported = folders
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    cache, parts = None, []
    with torch.no_grad():
        for part in TOKENS.split(steps, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_near(torch.cat(parts, dim=1), megatron_logits(megatron, TOKENS))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(folders, beams):
    megatron, exported = folders
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    settings = dict(max_new_tokens=40, do_sample=False, num_beams=beams, pad_token_id=0)
    made = model.generate(TOKENS[:, :20], return_dict_in_generate=True, output_logits=True, **settings)
    without = model.generate(TOKENS[:, :20], use_cache=False, **settings)
    assert torch.equal(made.sequences, without)
    if beams == 1:
        expected = megatron_logits(megatron, made.sequences)[:, 19:-1]
        assert (torch.stack(made.logits, dim=1) - expected).abs().max() < TOLERANCE


def test_cache_keeps_windows_and_summaries():
    """A window's text, a segment and a summary a chunk: nothing grows with the text but the summaries."""
    config = write_config(MODELS["every kind of layer"], "float32")
    config.pop("auto_map")
    model = MegatronKSAForCausalLM(MegatronKSAConfig(**config)).eval()
    cache = KSACache(model.config, 6000)
    with torch.no_grad():
        model(TOKENS[:1, :9], past_key_values=cache)
    rows = [layer.buffers[0].shape[2] for layer in cache.layers]
    # Windows of 2 and 1 chunks of 4, summaries of 1500 chunks and one more.
    assert rows == [3 * 4 + SEGMENT, 2 * 4 + SEGMENT + 1501, 6000, 6000]


@pytest.mark.parametrize("iteration", [0, 5, 10])
def test_half_annealed_models(iteration, to_megatron, tmp_path):
    """The coefficient of the summary projections goes into the export."""
    config = write_config(MODELS["ksa, harpe, hybrid"], "float32")
    config.pop("auto_map")
    torch.manual_seed(0)
    MegatronKSAForCausalLM(MegatronKSAConfig(**config)).save_pretrained(tmp_path / "random")
    stored = find_checkpoint(to_megatron(tmp_path / "random", tmp_path / "megatron"))
    ksa = dataclasses.replace(stored.settings.ksa, anneal_start=0, anneal_end=10)
    stored = dataclasses.replace(stored, settings=dataclasses.replace(stored.settings, ksa=ksa), iteration=iteration)
    (tmp_path / "exported").mkdir()
    export_checkpoint(stored, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["mix_coeff"] == 1 - iteration / 10
    with torch.no_grad():
        expected = load_model(stored, trainer_defaults(), torch.float32)(TOKENS, None)
    assert (transformers_logits(tmp_path / "exported", TOKENS) - expected).abs().max() < TOLERANCE


def test_loss(folders):
    _, exported = folders
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    output = model(TOKENS, labels=TOKENS)
    expected = -output.logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_files_need_torch_and_transformers_only():
    """This project's kernels are taken where they are installed: transformers requires no import inside a `try`."""
    for name in OWN_FILES:
        tree = ast.parse((Path(modeling.__file__).parent / f"{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {module.split(".")[0] for module in modules} <= {"copy", "math", "torch", "transformers", "megatron_ksa"}
        required = get_imports(Path(modeling.__file__).parent / f"{name}.py")
        assert set(required) <= {"copy", "math", "torch", "transformers"}
