"""Greedy decoding for evaluation, behind one signature for Megatron checkpoints and Hugging Face models."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_ksa.inference.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_ksa.model.gpt import KSAGPTModel

Tokens = list[int]
# Tokens of a prompt that go in at a time: their logits are formed together.
SEGMENT = 4096


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
    """A `Generate` of a whole model in this process; prompts of one length go together.

    Args:
        model: from `load_model`, in eval mode.
        stops: tokens that end a text.
    """

    def __init__(self, model: "KSAGPTModel", stops: Sequence[int] = ()) -> None:
        self.model, self.stops = model, frozenset(stops)

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
        """Continuations, in the order of the prompts."""
        made: dict[int, Tokens] = {}
        for length in {len(prompt) for prompt in prompts}:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            made.update(zip(places, self._alike([prompts[place] for place in places], new_tokens), strict=True))
        return [_until(made[place], self.stops) for place in range(len(prompts))]

    def _alike(self, prompts: list[Tokens], new_tokens: int) -> list[Tokens]:
        """Continuations of prompts of one length, what comes after a stop included."""
        batch = torch.tensor(prompts, device=next(self.model.parameters()).device)
        chosen: list[list[int]] = []
        with Decoder(self.model) as decoder:
            for segment in batch.split(SEGMENT, dim=1):
                logits = decoder.step(segment)[:, -1]
            ended = [False] * len(prompts)
            while len(chosen) < new_tokens and not all(ended):
                token = logits.argmax(-1)
                chosen.append(token.tolist())
                ended = [end or one in self.stops for end, one in zip(ended, chosen[-1], strict=True)]
                if len(chosen) < new_tokens:
                    logits = decoder.step(token[:, None])[:, -1]
        return [list(row) for row in zip(*chosen, strict=True)]


class HuggingFaceGreedy:
    """A `Generate` of a `transformers` model, padded on the left.

    Args:
        model: in eval mode.
        stops: tokens that end a text.
    """

    def __init__(self, model: "PreTrainedModel", stops: Sequence[int] = ()) -> None:
        self.model, self.stops = model, frozenset(stops)

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
