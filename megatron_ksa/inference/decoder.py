"""Incremental decoding of dense models, HARPE and grouped queries included: logits equal those of the full forward."""

from types import TracebackType

import torch
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.model.core_attention import CausalCoreAttention, KVCache
from megatron_ksa.model.gpt import KSAGPTModel


class Decoder:
    """Context manager in which a model goes on with a sequence whose keys and values it keeps.

    Keys are rotated by their KV group's base before they are cached, so that a step rotates new rows only.

    Args:
        model: a whole dense model in eval mode; it serves this sequence alone until the context ends.

    Raises:
        UsageError: a model with summary rows, or one that is in use by another decoder.
    """

    def __init__(self, model: KSAGPTModel) -> None:
        if model.layout.summary_tokens:
            raise UsageError("incremental decoding of KSA models is not there yet: use the full forward")
        self.model = model
        self._cores = [module for module in model.modules() if isinstance(module, CausalCoreAttention)]

    def __enter__(self) -> "Decoder":
        if any(core.cache is not None for core in self._cores):
            raise UsageError("the model serves another decoder: end that one first")
        for core in self._cores:
            core.cache = KVCache()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.model.position_offset = 0
        for core in self._cores:
            core.cache = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits after each of the next tokens of every sequence: a prompt, a part of it, or one token.

        Args:
            tokens: int64 [batch, new].

        Returns:
            [batch, new, vocabulary].
        """
        start = self._cores[0].cache.length
        self.model.position_offset = start
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(tokens, positions)


def greedy(model: KSAGPTModel, prompt: Tensor, new_tokens: int, stop: int | None = None) -> Tensor:
    """The most likely continuation, token by token.

    Args:
        prompt: int64 [1, n].
        stop: token that ends the continuation, included in it.

    Returns:
        int64 [1, up to new_tokens].
    """
    chosen: list[Tensor] = []
    with Decoder(model) as decoder:
        token = prompt
        while len(chosen) < new_tokens:
            token = decoder.step(token)[:, -1:].argmax(-1)
            chosen.append(token)
            if stop is not None and token.item() == stop:
                break
    return torch.cat(chosen, dim=1) if chosen else prompt[:, :0]
