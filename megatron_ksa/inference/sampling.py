"""How the next token is chosen from logits: each sequence by its own settings and its own random numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """How a text goes on.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = option(0.0, "Logits are divided by it; 0 takes the most likely token.")
    top_k: int = option(0, "Choose among so many of the most likely tokens; 0 for all.")
    top_p: float = option(1.0, "Choose among the fewest most likely tokens that have this probability together.")
    seed: int = option(0, "Of the random numbers. A prompt has the same text with the same seed, whatever else runs.")
    stop: tuple[str, ...] = option((), "Strings that end a text; they are no part of it.")
    max_new_tokens: int = option(128, "Tokens of a text at most.")

    def __post_init__(self) -> None:
        def refuse(name: str, rule: str) -> None:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: {rule}")

        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                refuse(name, "a number is needed")
        for name in ("top_k", "seed", "max_new_tokens"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                refuse(name, "an integer is needed")
        if self.temperature < 0:
            refuse("temperature", "0 (the most likely token) or more")
        if self.top_k < 0:
            refuse("top_k", "0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            refuse("seed", "from 0 to 2^63 - 1")
        if self.max_new_tokens < 1:
            refuse("max_new_tokens", "at least 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            refuse("stop", "strings that are not empty")

    @property
    def is_greedy(self) -> bool:
        """No random number is used."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1


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

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in settings], device=logits.device)[:, None]

    probabilities = (logits.double() / column("temperature").double()).softmax(-1)
    if not settings[0].filters:
        return _inverse(probabilities, uniform)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    top_k, rank = column("top_k"), torch.arange(logits.shape[1], device=logits.device)
    before = probabilities.cumsum(-1) - probabilities
    kept = ((top_k == 0) | (rank < top_k)) & (before < column("top_p").double())
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
