"""Many questions to one or several chat endpoints at once: each is answered once, paid for once, or listed."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megatron_ksa.data_tools.tags.taggers import Failure
from megatron_ksa.data_tools.tags.taggers.cache import AnswerCache, Spent
from megatron_ksa.data_tools.tags.taggers.chat import LIMITS, ChatClient, Refused
from megatron_ksa.data_tools.tags.taggers.prompt import BadAnswer
from megatron_ksa.data_tools.tags.taggers.reply import Reply, Unreachable
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError

# A longer answer than the limit allows is tried again once: at another temperature it may be shorter.
CUT_OFF_TRIES = 2
LONGEST_BACKOFF = 60.0
CUT_OFF = "answer cut off"


@dataclass(frozen=True)
class Question:
    """What is asked of the model, and what counts as its answer.

    Args:
        schema: JSON schema of the answer.
        parse: the answer in a message's content, as JSON; raises BadAnswer.
    """

    schema: dict
    parse: Callable[[Any], Any]


def question_key(settings: EndpointSettings, schema: dict, messages: list[dict]) -> str:
    """Name of a question: 64 hexadecimal digits of everything that decides the answer.

    The longest answer is not among it: an answer that fits is the same under any limit, so that a changed limit asks
    again about failed records only.
    """
    extra = {name: value for name, value in settings.extra.items() if name not in LIMITS}
    asked = [settings.model, extra, schema, messages]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def take(reply: Reply, question: Question, settings: EndpointSettings) -> Any:
    """The answer in a reply, as JSON.

    Raises:
        BadAnswer: there is none.
    """
    try:
        if reply.refusal is not None:
            raise BadAnswer(f"the model refuses: {reply.refusal[:200]}")
        return question.parse(reply.content)
    except BadAnswer:
        if not reply.cut_off:
            raise
    raise BadAnswer(
        f"finish_reason length: {reply.answer_tokens:,} tokens, with {reply.thought:,} characters of thoughts apart; "
        f"raise --llm-max-tokens {settings.max_tokens} or turn thoughts off with --llm-extra-body",
        CUT_OFF,
    )


def cost(settings: EndpointSettings, spent: Spent) -> float:
    """Price of what was spent."""
    return (spent.prompt_tokens * settings.input_price + spent.answer_tokens * settings.output_price) / 1e6


class Asker:
    """Asks questions that the cache does not answer.

    Args:
        settings: the endpoints.
        cache: takes answers as they come, and what each try took.
        question: what is asked.
    """

    def __init__(self, settings: EndpointSettings, cache: AnswerCache, question: Question) -> None:
        self.settings, self.cache, self.question = settings, cache, question
        self.failures: dict[str, Failure] = {}
        self._in_flight: set[str] = set()
        self.spent = Spent()
        self.without_reply = self.unreachable = 0
        self.slowest = settings.concurrency
        self._clients: list[ChatClient] = []

    def ask(self, chats: Iterable[tuple[str, list[dict]]], total: int) -> dict[str, Failure]:
        """Fill the cache; returns the failures by key. Equal questions are asked once.

        Args:
            chats: for each question its key and messages.
            total: questions.

        Raises:
            UsageError: an endpoint refuses every request (its word on key, model or path), or none can be reached.
        """
        return asyncio.run(self._ask(iter(chats), total))

    async def _ask(self, chats: Iterator[tuple[str, list[dict]]], total: int) -> dict[str, Failure]:
        settings = self.settings
        async with AsyncExitStack() as stack:
            for url in settings.urls:
                client = ChatClient(
                    url, settings.model, os.environ.get(settings.key_variable),
                    timeout=settings.timeout, max_tokens=settings.max_tokens, max_bytes=settings.max_bytes,
                    extra=settings.extra, schema=self.question.schema, connections=settings.concurrency,
                )  # fmt: skip
                self._clients.append(await stack.enter_async_context(client))
            workers = min(settings.concurrency * len(self._clients), max(total, 1))
            with tqdm(total=total, desc="ask", unit=" records") as progress:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(workers):
                            group.create_task(self._worker(chats, progress))
                except* UsageError as errors:
                    # Every worker meets the same refusal; one line tells it.
                    raise errors.exceptions[0] from None
        self.slowest = min(client.pace.lowest for client in self._clients)
        return self.failures

    async def _worker(self, chats: Iterator[tuple[str, list[dict]]], progress: tqdm) -> None:
        for key, messages in chats:
            if key not in self._in_flight and key not in self.failures and self.cache.get(key) is None:
                self._in_flight.add(key)
                failure = await self._answer(key, messages)
                self._in_flight.remove(key)
                if failure is not None:
                    self.failures[key] = failure
                progress.set_postfix(
                    failed=len(self.failures),
                    tokens=self.spent.prompt_tokens + self.spent.answer_tokens,
                    cost=f"{cost(self.settings, self.spent):.2f}",
                    refresh=False,
                )
            progress.update()

    def _client(self, tried: ChatClient | None) -> ChatClient:
        """The endpoint with most room; another one than the last, where that has failed and there are several."""
        others = [client for client in self._clients if client is not tried] or self._clients
        return max(others, key=lambda client: client.pace.room())

    async def _answer(self, key: str, messages: list[dict]) -> Failure | None:
        """Put the answer into the cache, or return why there is none."""
        failure, client, cut_off = Failure("not tried"), None, 0
        for attempt in range(self.settings.attempts):
            if attempt:
                await asyncio.sleep(min(LONGEST_BACKOFF, self.settings.backoff * 2 ** (attempt - 1)))
            client = self._client(client)
            try:
                reply = await client.ask(messages, attempt)
            except Refused as error:
                if error.for_all:
                    raise UsageError(f"--llm-url {client.url}: {error}") from None
                return Failure("refused by the endpoint", str(error), attempt + 1)
            except Unreachable as error:
                failure = Failure(error.reason, str(error), attempt + 1)
                self._count_unreachable(error)
                continue
            self.unreachable = 0
            self.spent = Spent(
                self.spent.tries + 1,
                self.spent.prompt_tokens + reply.prompt_tokens,
                self.spent.answer_tokens + reply.answer_tokens,
            )
            self.cache.spend(key, reply.prompt_tokens, reply.answer_tokens)
            try:
                self.cache.put(key, take(reply, self.question, self.settings))
                return None
            except BadAnswer as error:
                failure = Failure(error.reason, str(error), attempt + 1)
                cut_off += error.reason == CUT_OFF
                if cut_off == CUT_OFF_TRIES:
                    break
        return failure

    def _count_unreachable(self, error: Unreachable) -> None:
        """Give up when nothing at all comes back: a million records would fail one after the other."""
        self.without_reply += 1
        self.unreachable += 1
        workers = max(self.settings.concurrency * len(self._clients), 4)
        if error.reason == "no connection" and self.unreachable >= self.settings.attempts * workers:
            raise UsageError(
                f"--llm-url {', '.join(self.settings.urls)}: {self.unreachable} tries in a row without a connection "
                f"({error}); answers so far are kept, start the endpoint and run again"
            )
