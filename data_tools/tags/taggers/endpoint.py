"""Tagger: any OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp's server, a vendor's), asked concurrently."""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.taggers import Answer, Failure, prompt
from megatron_ksa.data_tools.tags.taggers.cache import AnswerCache
from megatron_ksa.data_tools.tags.taggers.chat import ChatClient, Refused, Unreachable
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible chat endpoint for --tagger llm.

    Raises:
        UsageError: a value out of range, or a URL that holds a secret.
    """

    url: str | None = option(None, "Base URL up to and with /v1, such as http://localhost:8000/v1.", flag="--llm-url")
    model: str = option("default", "Model name that the endpoint knows.", flag="--llm-model")
    key_variable: str = option(
        "OPENAI_API_KEY",
        "Environment variable that holds the API key; no key is sent where it is unset.",
        flag="--llm-key-variable",
    )
    concurrency: int = option(16, "Requests at a time.", flag="--llm-concurrency")
    attempts: int = option(5, "Tries of a record before it is listed as failed.", flag="--llm-attempts")
    backoff: float = option(
        1.0, "Seconds before the second try; doubled from try to try, up to 60.", flag="--llm-backoff"
    )
    timeout: float = option(120.0, "Seconds that one request may take.", flag="--llm-timeout")
    max_tokens: int = option(512, "Longest answer, tokens.", flag="--llm-max-tokens")
    characters: int = option(12_000, "Longest text shown; of a longer one the two ends.", flag="--llm-characters")
    input_price: float = option(0.0, "Price of a million prompt tokens, for the cost count.", flag="--llm-input-price")
    output_price: float = option(0.0, "Price of a million answer tokens.", flag="--llm-output-price")

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_tokens", "characters"):
            if getattr(self, name) < 1:
                raise UsageError(f"--llm-{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("backoff", "timeout", "input_price", "output_price"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--llm-{name.replace('_', '-')} {getattr(self, name)}: at least 0")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError("--llm-url: give http://HOST:PORT/v1 or https://HOST/v1")
            if parts.username or parts.password or parts.query:
                raise UsageError(
                    "--llm-url: no user, password or query in the URL; the key comes from --llm-key-variable"
                )


class EndpointTagger:
    """Asks a chat endpoint about every record; answers are cached as they come, so a rerun asks for the rest only.

    Args:
        settings: the endpoint.
        cache: file of answers.
    """

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        if settings.url is None:
            raise UsageError("--tagger llm: name the endpoint with --llm-url")
        self._settings, self._cache_path = settings, cache
        self._totals: dict = {}

    def settings(self) -> dict:
        """Everything that decides the answers."""
        settings = self._settings
        decisive = {"model": settings.model, "max_tokens": settings.max_tokens, "characters": settings.characters}
        return {"tagger": "llm", "prompt": prompt.SYSTEM, "schema": prompt.SCHEMA} | decisive

    def _key(self, record: dict) -> str:
        asked = [self.settings(), prompt.messages(record_text(record), self._settings.characters)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order.

        Raises:
            UsageError: the endpoint refuses every request (its word on key, model or path), or cannot be reached.
        """
        cache = AnswerCache(self._cache_path)
        try:
            failures = asyncio.run(_Run(self._settings, cache, self._key).ask(records, total))
            prompt_tokens = answer_tokens = 0
            for number, record in enumerate(read_jsonl(records)):
                if number in failures:
                    yield failures[number]
                    continue
                answer, asked, answered = cache.get(self._key(record))
                prompt_tokens, answer_tokens = prompt_tokens + asked, answer_tokens + answered
                yield answer
            self._totals = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
            self._totals["cost"] = round(_cost(self._settings, prompt_tokens, answer_tokens), 6)
        finally:
            cache.close()

    def totals(self) -> dict:
        """Tokens and cost of the answers taken, those of earlier runs included, those of failed tries not."""
        return self._totals


def _cost(settings: EndpointSettings, prompt_tokens: int, answer_tokens: int) -> float:
    return (prompt_tokens * settings.input_price + answer_tokens * settings.output_price) / 1e6


class _Run:
    """One pass over the records: asks for those not in the cache, and counts what is spent, failed tries included."""

    def __init__(self, settings: EndpointSettings, cache: AnswerCache, key) -> None:
        self.settings, self.cache, self.key = settings, cache, key
        self.failures: dict[int, Failure] = {}
        self.prompt_tokens = self.answer_tokens = self.unreachable = 0

    async def ask(self, records: Path, total: int) -> dict[int, Failure]:
        """Fill the cache; returns the failures by line."""
        rows = enumerate(read_jsonl(records))
        with tqdm(total=total, desc="ask", unit=" records") as progress:
            client = ChatClient(
                self.settings.url, self.settings.model, os.environ.get(self.settings.key_variable),
                timeout=self.settings.timeout, max_tokens=self.settings.max_tokens, schema=prompt.SCHEMA,
                connections=self.settings.concurrency,
            )  # fmt: skip
            async with client:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.settings.concurrency, max(total, 1))):
                            group.create_task(self._worker(client, rows, progress))
                except* UsageError as errors:
                    # Every worker meets the same refusal; one line tells it.
                    raise errors.exceptions[0] from None
        return self.failures

    async def _worker(self, client: ChatClient, rows: Iterator[tuple[int, dict]], progress: tqdm) -> None:
        for number, record in rows:
            key = self.key(record)
            if self.cache.get(key) is None:
                answer = await self._answer(client, record)
                if isinstance(answer, Failure):
                    self.failures[number] = answer
                else:
                    self.cache.put(key, *answer)
                spent = _cost(self.settings, self.prompt_tokens, self.answer_tokens)
                progress.set_postfix(
                    failed=len(self.failures),
                    tokens=self.prompt_tokens + self.answer_tokens,
                    cost=f"{spent:.2f}",
                    refresh=False,
                )
            progress.update()

    async def _answer(self, client: ChatClient, record: dict) -> tuple[Answer, int, int] | Failure:
        """The record's answer with its prompt's and its own tokens, or why there is none."""
        chat = prompt.messages(record_text(record), self.settings.characters)
        failure = Failure("not tried")
        for attempt in range(self.settings.attempts):
            wait = min(60.0, self.settings.backoff * 2 ** (attempt - 1)) if attempt else 0.0
            if wait:
                await asyncio.sleep(max(wait, client.retry_after()))
            try:
                reply = await client.ask(chat, attempt)
            except Refused as error:
                if error.for_all:
                    raise UsageError(f"--llm-url {self.settings.url}: {error}") from None
                return Failure("refused by the endpoint", str(error), attempt + 1)
            except Unreachable as error:
                failure = Failure(error.reason, str(error), attempt + 1)
                self._count_unreachable(error)
                continue
            self.unreachable = 0
            self.prompt_tokens += reply.prompt_tokens
            self.answer_tokens += reply.answer_tokens
            try:
                return prompt.parse_answer(reply.content), reply.prompt_tokens, reply.answer_tokens
            except prompt.BadAnswer as error:
                failure = Failure("invalid answer", str(error), attempt + 1)
        return failure

    def _count_unreachable(self, error: Unreachable) -> None:
        """Give up when nothing at all comes back: a million records would fail one after the other."""
        self.unreachable += 1
        if error.reason == "no connection" and self.unreachable >= self.settings.attempts * max(
            self.settings.concurrency, 4
        ):
            raise UsageError(
                f"--llm-url {self.settings.url}: {self.unreachable} tries in a row without a connection ({error}); "
                "answers so far are kept, start the endpoint and run again"
            )
