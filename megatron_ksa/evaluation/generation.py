"""Greedy decoding for evaluation, behind one signature for Megatron checkpoints and Hugging Face models."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_ksa.config.sampling import SamplingSettings
from megatron_ksa.inference.generator import Generator, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_ksa.model.gpt import KSAGPTModel

Tokens = list[int]


class Generate(Protocol):
    """The most likely continuations of a batch of prompts."""

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
        """Up to `new_tokens` tokens for each prompt, without the token that ends a text."""


def in_batches[Item](items: Sequence[Item], length: int, tokens_per_batch: int) -> Iterator[Sequence[Item]]:
    """Batches of items of `length` tokens each, of at most `tokens_per_batch` tokens, or of one item."""
    step = max(tokens_per_batch // length, 1)
    return (items[first : first + step] for first in range(0, len(items), step))


def _until(tokens: Tokens, stops: frozenset[int]) -> Tokens:
    """The tokens before the first that ends a text."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]


class MegatronGreedy:
    """A `Generate` of a whole model in this process; prompts of any lengths go together.

    Args:
        model: from `load_model`, in eval mode.
        stops: tokens that end a text.
    """

    def __init__(self, model: "KSAGPTModel", stops: Sequence[int] = ()) -> None:
        self.model, self.stops = model, frozenset(stops)

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
        """Continuations, in the order of the prompts."""
        longest, settings = max(map(len, prompts)) + new_tokens, SamplingSettings(max_new_tokens=new_tokens)
        generator = Generator(self.model, len(prompts), longest, end_tokens=sorted(self.stops))
        made = generator.generate([Request(prompt, settings) for prompt in prompts])
        return [_until(completion.tokens, self.stops) for completion in made]


class HuggingFaceGreedy:
    """A `Generate` of a `transformers` model, padded on the left.

    Args:
        model: in eval mode; its own generation settings are removed.
        stops: tokens that end a text.
    """

    def __init__(self, model: "PreTrainedModel", stops: Sequence[int] = ()) -> None:
        from transformers import GenerationConfig

        self.model, self.stops = model, frozenset(stops)
        # `generate` takes from there what a call leaves open: penalties, and tokens that are never written.
        model.generation_config = GenerationConfig()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
        """Continuations, in the order of the prompts."""
        from transformers import GenerationConfig

        longest, device = max(map(len, prompts)), self.model.device
        stop = sorted(self.stops)
        filler = stop[0] if stop else 0
        ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        start = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= start[:, None]).long()
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop or None, pad_token_id=filler
        )
        made = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        return [_until(row, self.stops) for row in made[:, longest:].tolist()]
