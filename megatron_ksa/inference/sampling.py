"""How the next token is chosen from logits: each sequence by its own settings and its own random numbers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_ksa.config.sampling import SamplingSettings


class RandomStream:
    """Random numbers of one sequence: they depend on its seed and the token's number alone."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()


def _inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Places at which the cumulated probabilities [rows, words] pass uniform [rows] times their sum: int64 [rows]."""
    sums = probabilities.cumsum(-1)
    places = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    # Rounding may lead behind the last word that has a probability.
    last = (probabilities > 0).long().mul(torch.arange(1, sums.shape[1] + 1, device=sums.device)).amax(-1) - 1
    return torch.minimum(places, last)


def _draw(logits: Tensor, settings: Sequence[SamplingSettings], uniform: Tensor) -> Tensor:
    """Tokens int64 [rows] drawn from logits [rows, words]; the settings filter in every row or in none."""

    # float64 as the settings are: 1e-50 is no zero, and 2 beside 0.7 is what it is alone.
    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device=logits.device)[:, None]

    below = logits.double() - logits.double().amax(-1, keepdim=True)
    probabilities = (below / column(each.temperature for each in settings)).softmax(-1)
    if not settings[0].filters:
        return _inverse(probabilities, uniform)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    words = logits.shape[1]
    top_k = column(min(each.top_k or words, words) for each in settings)
    before = probabilities.cumsum(-1) - probabilities
    kept = (torch.arange(words, device=logits.device) < top_k) & (before < column(each.top_p for each in settings))
    return tokens.gather(1, _inverse(probabilities * kept, uniform)[:, None])[:, 0]


def choose(logits: Tensor, settings: Sequence[SamplingSettings], streams: Sequence[RandomStream]) -> Tensor:
    """The next token of each sequence. A row's token depends on the row, its settings and its stream alone.

    Args:
        logits: float32 [rows, words].
        settings, streams: one a row.

    Returns:
        int64 [rows], on the logits' device.
    """
    chosen = logits.argmax(-1)
    for filters in (False, True):
        rows = [i for i, each in enumerate(settings) if not each.is_greedy and each.filters == filters]
        if rows:
            index = torch.tensor(rows, device=logits.device)
            uniform = torch.tensor([streams[i].next() for i in rows], dtype=torch.float64, device=logits.device)
            chosen[index] = _draw(logits[index], [settings[i] for i in rows], uniform)
    return chosen
