"""Taggers: an LLM behind an OpenAI-compatible endpoint, offline keyphrases, and tags already in the data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Answer:
    """A tagger's answer about one record.

    Args:
        tags: 1 or more, as `records.clean_tags` leaves them.
        quality, difficulty: 1 to 10, or None where the tagger does not score.
        dropped: tags left out of the answer, with why.
    """

    tags: list[str]
    quality: float | None = None
    difficulty: float | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """Why a record has no tags: a reason that can be counted, its detail, and how often it was tried."""

    reason: str
    detail: str = ""
    attempts: int = 1
    dropped: list[tuple[str, str]] = field(default_factory=list)


class Tagger(Protocol):
    """What the tagging step needs of a tagger."""

    def settings(self) -> dict:
        """Everything that decides the answers, as JSON, without secrets."""

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order; `total` lines."""

    def totals(self) -> dict:
        """What the tagger spent on the answers, as JSON; empty where that means nothing."""
