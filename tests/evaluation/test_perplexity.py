"""Sliding-window perplexity against the model's own loss."""

import numpy as np
import pytest
import torch
from single_process import build_model, random_tokens

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.perplexity import sliding_window_perplexity, window_ends


@pytest.mark.parametrize("ksa", [KSAConfig(), KSAConfig(enabled=True, chunk_size=4, window_chunks="2")])
def test_scores_the_last_targets_of_each_window(ksa):
    model = build_model(ksa).eval()
    document = random_tokens(1, 73)[0]
    results = sliding_window_perplexity(model, [document.numpy()], [24, 40], stride=16, windows=9)
    for result, length in zip(results, (24, 40), strict=True):
        losses = []
        for end in (41, 57, 73):
            window = document[end - length - 1 : end][None]
            with torch.no_grad():
                loss = model(window[:, :-1], torch.arange(length)[None], labels=window[:, 1:])
            losses.append(loss[0, -16:].mean().item())
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert (result.windows, result.tokens) == (3, 48)
        assert result.standard_error == pytest.approx(np.std(losses, ddof=1) / 3**0.5, rel=1e-3)


def test_windows_are_spread_over_documents():
    assert window_ends([10, 30, 20], 15, 5, 99) == [(1, 16), (1, 21), (1, 26), (2, 16)]
    assert window_ends([10, 30, 20], 15, 5, 2) == [(1, 16), (2, 16)]


def test_refused():
    with pytest.raises(UsageError, match="no document has 101 tokens, the longest has 50"):
        window_ends([50], 100, 5, 1)
    with pytest.raises(UsageError, match="shorter than the stride"):
        sliding_window_perplexity(None, [], [8], stride=16)
