"""Generation for many requests at a time: sequences join a running batch as soon as another one has left."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ksa.config.sampling import SamplingSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.inference.sampling import RandomStream, choose
from megatron_ksa.inference.state import SEGMENT, DecodingState
from megatron_ksa.inference.text import GrowingText
from megatron_ksa.model.gpt import KSAGPTModel

# Why a text ends: a stop string, an end token, the most new tokens, or the most tokens of a sequence.
STOP, END, NEW_TOKENS, MAX_LENGTH = "stop", "end", "max_new_tokens", "max_length"


class Decodes(Protocol):
    """What a generator needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Request:
    """A prompt, in token ids, and how it goes on."""

    prompt: Sequence[int]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True)
class Completion:
    """How a request went on.

    Attributes:
        index: number of the request.
        tokens: new ones, with the end token or those of the stop string where one came.
        text: of the tokens, without end token and stop string; None without a tokenizer.
        finish: why it ends: stop, end, max_new_tokens or max_length.
    """

    index: int
    tokens: list[int]
    text: str | None
    finish: str


def check_request(request: Request, max_length: int, words: int) -> None:
    """Refuse a prompt that cannot run.

    Args:
        max_length: tokens of the longest sequence.
        words: of the model's vocabulary.

    Raises:
        UsageError: no tokens, no room for a text, or ids beyond the vocabulary.
    """
    length = len(request.prompt)
    if not length:
        raise UsageError("the prompt is empty: it has no tokens")
    if length >= max_length:
        raise UsageError(f"the prompt has {length} tokens: with its text it has at most {max_length} (--max-length)")
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= words:
        raise UsageError(f"the prompt has ids from {low} to {high}: the model has {words} words (--tokenizer-model)")


class _Running:
    """A request that has a slot."""

    def __init__(self, index: int, request: Request, slot: int, tokenizer: Decodes | None) -> None:
        self.index, self.request, self.slot = index, request, slot
        self.stream = RandomStream(request.sampling.seed)
        self.tokens: list[int] = []
        self.text = None
        if tokenizer is not None:
            self.text = GrowingText(tokenizer.decode, request.prompt, request.sampling.stop)


class Generator:
    """Generates text for requests, `max_batch` of them at a time.

    Args:
        model: a whole model in eval mode.
        max_batch: sequences at a time.
        max_length: tokens of the longest sequence, prompt and text.
        tokenizer: decodes text and finds stop strings; without it there are tokens only.
        end_tokens: ids that end a text.
        vocabulary: ids below it are chosen; the model's number of words by default. Embeddings are often padded.
        segment: tokens of a prompt at a time.
        every_slot, cuda_graph: as in `DecodingState`.

    Raises:
        UsageError: more keys and values than there is memory for.
    """

    def __init__(
        self,
        model: KSAGPTModel,
        max_batch: int,
        max_length: int,
        *,
        tokenizer: Decodes | None = None,
        end_tokens: Sequence[int] = (),
        vocabulary: int | None = None,
        segment: int = SEGMENT,
        every_slot: bool | None = None,
        cuda_graph: bool = True,
    ) -> None:
        self.state = DecodingState(model, max_batch, max_length, segment, every_slot=every_slot, cuda_graph=cuda_graph)
        self.tokenizer, self.end_tokens = tokenizer, frozenset(end_tokens)
        self.vocabulary = min(vocabulary or model.vocab_size, model.vocab_size)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot run, see `check_request`."""
        check_request(request, self.state.max_length, self.state.model.vocab_size)
        if request.sampling.stop and self.tokenizer is None:
            raise UsageError("stop strings are found by a tokenizer: there is none")

    def generate(self, requests: Sequence[Request], progress: bool = False) -> list[Completion]:
        """The completions of requests, in their order.

        Args:
            progress: show a bar.

        Raises:
            UsageError: a request that cannot run (see `check`), before any runs.
        """
        completions = self.as_completed(requests)
        return sorted(
            tqdm(completions, total=len(requests), unit="text", disable=not progress), key=lambda each: each.index
        )

    def as_completed(
        self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None
    ) -> Iterator[Completion]:
        """Completions of requests, each as soon as it ends.

        Args:
            on_text: called with a request's index and new text of it as it grows.

        Raises:
            UsageError: a request that cannot run (see `check`), before any runs.
        """
        for request in requests:
            self.check(request)
        return self._run(deque(enumerate(requests)), on_text)

    def _run(
        self, waiting: deque[tuple[int, Request]], on_text: Callable[[int, str], None] | None
    ) -> Iterator[Completion]:
        state, running = self.state, []
        filling: _Running | None = None
        with state:
            try:
                while waiting or running or filling:
                    if filling is None and waiting and state.has_room:
                        filling = _Running(*waiting.popleft(), state.join(), self.tokenizer)
                    gone_on: list[_Running] = list(running)
                    logits = self._decode(running) if running else None
                    # One segment of one prompt between two steps: the others do not wait for a whole prompt.
                    if filling is not None and (last := self._fill(filling)) is not None:
                        gone_on.append(filling)
                        running.append(filling)
                        logits = last[None] if logits is None else torch.cat([logits, last[None]])
                        filling = None
                    if logits is None:
                        continue
                    for run, finish in zip(gone_on, self._take(gone_on, logits), strict=True):
                        if run.text is not None and on_text is not None and (news := run.text.news(bool(finish))):
                            on_text(run.index, news)
                        if finish:
                            running.remove(run)
                            state.leave(run.slot)
                            yield Completion(run.index, run.tokens, None if run.text is None else run.text.text, finish)
            finally:
                for run in [*running, *([filling] if filling else [])]:
                    state.leave(run.slot)

    def _fill(self, run: _Running) -> Tensor | None:
        """Go on with a prompt by a segment; after its last one, the logits [words]."""
        start = self.state.lengths[run.slot]
        part = run.request.prompt[start : start + self.state.segment]
        return self.state.prefill(run.slot, part, logits=start + len(part) == len(run.request.prompt))

    def _decode(self, running: list[_Running]) -> Tensor:
        """Logits [sequences, words] after each sequence's last token."""
        tokens = torch.tensor([run.tokens[-1] for run in running])
        return self.state.decode([run.slot for run in running], tokens)

    def _take(self, runs: list[_Running], logits: Tensor) -> list[str | None]:
        """Choose a token for each sequence; why each of them ends, or None.

        Raises:
            UsageError: logits that are no numbers, which would choose tokens all the same.
        """
        if not logits.isfinite().all():
            bad = ", ".join(str(run.index) for run, row in zip(runs, logits.isfinite().all(-1), strict=True) if not row)
            raise UsageError(f"the model's logits are not finite (prompt {bad}): try --dtype bfloat16 or float32")
        chosen = choose(
            logits[:, : self.vocabulary], [run.request.sampling for run in runs], [run.stream for run in runs]
        )
        return [self._add(run, token) for run, token in zip(runs, chosen.tolist(), strict=True)]

    def _add(self, run: _Running, token: int) -> str | None:
        run.tokens.append(token)
        finish = None
        if token in self.end_tokens:
            finish = END
        elif run.text is not None:
            run.text.add(token)
            finish = STOP if run.text.stopped else None
        if finish is None and len(run.tokens) == run.request.sampling.max_new_tokens:
            finish = NEW_TOKENS
        if finish is None and len(run.request.prompt) + len(run.tokens) == self.state.max_length:
            finish = MAX_LENGTH
        if finish and run.text is not None:
            run.text.finish()
            finish = STOP if run.text.stopped else finish
        return finish
