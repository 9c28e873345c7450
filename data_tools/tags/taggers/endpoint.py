"""Tagger: any OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp's server, a vendor's), asked concurrently."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.taggers import Answer, Failure, prompt
from megatron_ksa.data_tools.tags.taggers.ask import Asker, Question, cost, question_key
from megatron_ksa.data_tools.tags.taggers.cache import AnswerCache, Spent
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError

QUESTION = Question(prompt.SCHEMA, lambda content: asdict(prompt.parse_answer(content)))


class EndpointTagger:
    """Asks chat endpoints about every record; answers are cached as they come, so a rerun asks for the rest only.

    Args:
        settings: the endpoints.
        cache: file of answers.
    """

    # For a record with neither an answer nor a failure.
    MISSING = Failure("not asked", attempts=0)

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        self._settings, self._cache_path = settings, cache
        self._totals: dict = {}

    def settings(self) -> dict:
        """Everything that decides the answers."""
        settings = self._settings
        decisive = {"model": settings.model, "max_tokens": settings.max_tokens, "characters": settings.characters}
        return {"tagger": "llm", "prompt": prompt.SYSTEM, "schema": prompt.SCHEMA, "extra": settings.extra} | decisive

    def questions(self, records: Path) -> Iterator[tuple[str, list[dict]]]:
        """For each record the key of its answer and the chat that asks for it."""
        for record in read_jsonl(records):
            messages = prompt.messages(record_text(record), self._settings.characters)
            yield question_key(self._settings, prompt.SCHEMA, messages), messages

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order.

        Raises:
            UsageError: an endpoint refuses every request (its word on key, model or path), or none can be reached.
        """
        cache = AnswerCache(self._cache_path)
        try:
            failures = self._fill(cache, records, total)
            spent = Spent()
            for key, _ in self.questions(records):
                spent = Spent(*map(sum, zip(spent, cache.spent_once(key), strict=True)))
                value = cache.get(key)
                yield failures.get(key, self.MISSING) if value is None else Answer(**value)
            self._totals |= {"prompt_tokens": spent.prompt_tokens, "answer_tokens": spent.answer_tokens}
            self._totals |= {"tries": spent.tries, "cost": round(cost(self._settings, spent), 6)}
        finally:
            cache.close()

    def _fill(self, cache: AnswerCache, records: Path, total: int) -> dict[str, Failure]:
        """Put answers into the cache; returns the failures by key."""
        if not self._settings.urls:
            raise UsageError("--tagger llm: name the endpoint with --llm-url")
        asker = Asker(self._settings, cache, QUESTION)
        failures = asker.ask(self.questions(records), total)
        if asker.without_reply:
            self._totals["tries_without_reply"] = asker.without_reply
        return failures

    def totals(self) -> dict:
        """Tokens, tries and cost of the records' answers, those of earlier runs and of failed tries included.

        A try without a reply may cost too; an endpoint does not say how much.
        """
        return self._totals
