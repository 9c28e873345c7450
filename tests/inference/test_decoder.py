"""Decoding with a cache gives the full forward's logits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.checkpoint.load import find_checkpoint, load_model
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.needle import Case, score_cases
from megatron_ksa.huggingface.importer import import_checkpoint
from megatron_ksa.inference.decoder import Decoder, greedy
from megatron_ksa.platform import trainer_defaults

GOLDEN = Path(__file__).parents[1] / "golden" / "ksa_hf_tiny"
DENSE = KSAConfig()


@pytest.mark.parametrize("bases", [None, (1e4, 5e5)])
@pytest.mark.parametrize("steps", [[1] * 21, [13] + [1] * 8, [5, 1, 9, 6]])
@pytest.mark.parametrize("changes", [{}, {"rotary_interleaved": True}, {"num_query_groups": 4}])
def test_decoding_equals_the_full_forward(bases, steps, changes):
    if bases and "num_query_groups" in changes:
        bases = (*bases, 1e5, 3e5)
    model = build_model(DENSE, transformer_config(**changes), bases=bases, rotary_percent=0.5).eval()
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        expected = model(tokens, torch.arange(21).expand_as(tokens))
    with Decoder(model) as decoder:
        parts = [decoder.step(part) for part in tokens.split(steps, dim=1)]
    assert_close("logits", torch.cat(parts, dim=1), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens, torch.arange(21).expand_as(tokens)), expected)


def test_teacher_forcing_scores_what_greedy_decoding_writes():
    """Exact match under teacher forcing: the decoded answer is right, the answer with one other token is not."""
    model = build_model(DENSE, bases=(1e4, 5e5)).eval()
    prompt = random_tokens(1, 30)
    answer = greedy(model, prompt, 6)[0].tolist()
    wrong = answer[:4] + [(answer[4] + 1) % 64, answer[5]]
    cases = [Case(prompt[0].tolist(), [a[:2], a[2:]]) for a in (answer, wrong)]
    scores = score_cases(model, [*cases, Case(prompt[0, :7].tolist(), [[0]])])
    assert scores[:2] == [(True, 1.0), (False, 0.5)]


KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 0, 2]", layer_pattern="kklf")
KSA_MODELS = {
    "hybrid": KSA,
    "two summaries, all of their own": dataclasses.replace(
        KSA, summary_tokens=2, independent_qk_norm=True, independent_layernorm=True
    ),
    "windows without summaries": dataclasses.replace(KSA, layer_pattern="w"),
    "windows beside summaries": dataclasses.replace(KSA, layer_pattern="wkwf"),
    "more summaries than text": dataclasses.replace(KSA, chunk_size=3, summary_tokens=4, layer_pattern="k"),
}


@pytest.mark.parametrize("ksa", KSA_MODELS.values(), ids=KSA_MODELS)
@pytest.mark.parametrize("steps", [[1] * 41, [30] + [1] * 11, [3, 1, 9, 2, 26]])
def test_decoding_equals_the_full_forward_with_summaries(ksa, steps):
    """Steps within a chunk, that complete one, and over several; windows that are left behind; a ragged end."""
    model = build_model(ksa, bases=(1e4, 5e5)).eval()
    tokens = random_tokens(2, 41)
    with torch.no_grad():
        expected = model(tokens, None)
    with Decoder(model) as decoder:
        parts = [decoder.step(part) for part in tokens.split(steps, dim=1)]
    assert_close("logits", torch.cat(parts, dim=1), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens, None), expected)


def test_annealed_models_decode():
    model = build_model(KSA).eval()
    model.set_summary_coefficient(0.3)
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        expected = model(tokens, None)
    with Decoder(model) as decoder:
        assert_close("logits", torch.cat([decoder.step(t) for t in tokens.split(1, dim=1)], dim=1), expected)


def test_released_implementation_decodes_to_the_same_logits(megatron_flags, tmp_path):
    """The released implementation's full forward, token by token here."""
    import_checkpoint(GOLDEN, tmp_path)
    model = load_model(find_checkpoint(tmp_path), trainer_defaults(), torch.float32)
    tokens, expected = (torch.tensor(np.load(GOLDEN / f"{name}.npy")) for name in ("input_ids", "logits"))
    with Decoder(model) as decoder:
        logits = torch.cat([decoder.step(token) for token in tokens.split(1, dim=1)], dim=1)
    assert (logits - expected).abs().max() < 1e-4


def test_what_a_ksa_layer_keeps():
    """W + 1 chunks of text at most, and S rows for each complete chunk."""
    model = build_model(KSA).eval()
    with Decoder(model) as decoder:
        for token in random_tokens(1, 41).split(1, dim=1):
            decoder.step(token)
            for layer, window in zip(model.decoder.layers[:2], (2, 1), strict=True):
                cache = layer.self_attention.core_attention.cache
                assert cache.text.length == decoder.length
                assert cache.text.length - cache.text.first < (window + 1) * 4
                assert cache.summaries.length == decoder.length // 4


def test_refused():
    model = build_model(DENSE).eval()
    with Decoder(model), pytest.raises(UsageError, match="another decoder"), Decoder(model):
        pass
