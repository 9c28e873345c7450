"""Decoding with a cache gives the full forward's logits."""

import pytest
import torch
from compare import assert_close
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.needle import Case, score_cases
from megatron_ksa.inference.decoder import Decoder, greedy

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


def test_refused():
    with pytest.raises(UsageError, match="KSA"):
        Decoder(build_model(KSAConfig(enabled=True)))
    model = build_model(DENSE).eval()
    with Decoder(model), pytest.raises(UsageError, match="another decoder"), Decoder(model):
        pass
