"""Incremental decoding, with KSA, HARPE and grouped queries: logits equal those of the full forward."""

import dataclasses
from types import TracebackType

import torch
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.cache import KSACache, KVCache
from megatron_ksa.model.core_attention import KSACoreAttention, TextCoreAttention
from megatron_ksa.model.gpt import KSAGPTModel


class Decoder:
    """Context manager in which a model goes on with a sequence whose keys and values it keeps.

    Keys are rotated by their KV group's base before they are cached, so that a step rotates new rows only. A full layer
    keeps every token, a KSA layer the text of its window and every summary.

    Args:
        model: a whole model in eval mode; it serves this sequence alone until the context ends.

    Raises:
        UsageError: a model that is in use by another decoder.
    """

    def __init__(self, model: KSAGPTModel) -> None:
        self.model = model
        self.length = 0
        self._layout = model.layout
        self._cores = [m for m in model.modules() if isinstance(m, KSACoreAttention | TextCoreAttention)]
        # Which rows of a step are text depends on where in its chunk the step starts.
        self._laid_out = [m for m in model.modules() if isinstance(getattr(m, "layout", None), RowLayout)]

    def __enter__(self) -> "Decoder":
        if any(core.cache is not None for core in self._cores):
            raise UsageError("the model serves another decoder: end that one first")
        for core in self._cores:
            core.cache = KVCache() if core.geometry is None else KSACache()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._move_to(0)
        for core in self._cores:
            core.cache = None

    def _move_to(self, token: int) -> None:
        """Tell the model the number of the next token."""
        self.length = self.model.position_offset = token
        layout = dataclasses.replace(self._layout, offset=token % self._layout.chunk_size)
        for module in self._laid_out:
            module.layout = layout

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits after each of the next tokens of every sequence: a prompt, a part of it, or one token.

        Args:
            tokens: int64 [batch, new].

        Returns:
            [batch, new, vocabulary].
        """
        end = self.length + tokens.shape[1]
        positions = torch.arange(self.length, end, device=tokens.device).expand_as(tokens)
        logits = self.model(tokens, positions)
        self._move_to(end)
        return logits


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
