"""Sliding-window perplexity (Press et al. 2022, arXiv 2108.12409): every scored token has a whole context before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.forward import token_losses
from megatron_ksa.model.forward import hidden_states
from megatron_ksa.model.gpt import KSAGPTModel


@dataclass(frozen=True)
class Perplexity:
    """Result at one context length.

    Attributes:
        length: tokens that a window reads.
        windows: windows scored.
        tokens: tokens scored, stride times windows.
        loss: mean cross-entropy, nats a token.
        standard_error: of the loss, over windows; NaN for a single window.
    """

    length: int
    windows: int
    tokens: int
    loss: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def window_ends(sizes: Sequence[int], length: int, stride: int, windows: int) -> list[tuple[int, int]]:
    """Where windows end: (document, tokens before the end of the window's targets), spread evenly over all places.

    Ends are `stride` apart in every document that holds `length` tokens and their next ones.

    Args:
        sizes: tokens of each document.
        length: the longest context length.
        windows: the most that are returned.

    Raises:
        UsageError: no document is long enough.
    """
    ends = [(i, end) for i, size in enumerate(sizes) for end in range(length + 1, size + 1, stride)]
    if not ends:
        raise UsageError(
            f"no document has {length + 1} tokens, the longest has {max(sizes, default=0)}: shorter --lengths, other "
            "data, or --concatenate"
        )
    picked = np.linspace(0, len(ends) - 1, min(windows, len(ends))).round().astype(int)
    return [ends[i] for i in picked]


def sliding_window_perplexity(
    model: KSAGPTModel, documents: Sequence[np.ndarray], lengths: Sequence[int], *, stride: int = 256, windows: int = 32
) -> list[Perplexity]:
    """Perplexity at each context length, over the same tokens: the lengths differ in nothing but the context.

    A window of L tokens scores its last `stride` targets, which see L - stride + 1 to L tokens; windows end at the
    same places for all lengths.

    Args:
        documents: integer [tokens] each.
        lengths: L, all at least `stride`.
        windows: windows to score, at most.

    Raises:
        UsageError: a length below the stride, or no document that holds the longest one.
    """
    if min(lengths) < stride:
        raise UsageError(f"length {min(lengths)} is shorter than the stride {stride}")
    ends = window_ends([len(documents[i]) for i in range(len(documents))], max(lengths), stride, windows)
    results = []
    for length in lengths:
        means = []
        for document, end in tqdm(ends, desc=f"perplexity at {length}", unit="window", leave=False):
            window = torch.from_numpy(np.asarray(documents[document][end - length - 1 : end], dtype=np.int64))
            hidden = hidden_states(model, window[None, :-1])[0, -stride:]
            means.append(token_losses(model, hidden, window[-stride:]).mean().item())
        error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
        results.append(Perplexity(length, len(means), stride * len(means), float(np.mean(means)), error))
    return results
