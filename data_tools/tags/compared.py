"""What two records are compared by: what was asked, what was answered, and the words that tell answers apart."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from megatron_ksa.data_tools.tags import minhash

# Fields of a record that are not its content.
OUTSIDE = ("id", "source", "quality", "difficulty", "tags")
# Fields of a message that are not what was said.
MARKS = ("role", "content", "weight", "name", "id", "tool_call_id")
_ANSWERED = 0x9E3779B97F4A7C15
_DENIED = re.compile(r"n['\u2019]t\b")
_CONTRACTED = re.compile(r"['\u2019](?:s|m|d|re|ve|ll)\b")
# A and I are words of prose.
_TELLING = re.compile(rf"[b-hj-z]|[{minhash.OPERATORS}!]+|\w*\d\w*|no|not|none|nor|never|cannot|yes|true|false|without")


def _one_blank(value: Any) -> Any:
    """A value whose texts have no white space at their ends and one blank for any between words."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {name: _one_blank(each) for name, each in value.items()}
    return [_one_blank(each) for each in value] if isinstance(value, list) else value


def exact_key(record: dict) -> bytes:
    """16 bytes of the content's hash; Unicode composition and the amount of white space do not matter."""
    content = _one_blank({name: value for name, value in record.items() if name not in OUTSIDE})
    folded = unicodedata.normalize("NFC", json.dumps(content, ensure_ascii=False, sort_keys=True))
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _said(message: dict) -> str:
    """Text of a message, with tool calls and whatever else it says."""
    content = message.get("content")
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) if content else ""]
    for name in sorted(message.keys() - set(MARKS)):
        if message[name]:
            parts.append(json.dumps(message[name], ensure_ascii=False, sort_keys=True))
    return "\n".join(part for part in parts if part)


def asked_and_answered(record: dict) -> tuple[str, str]:
    """What comes from users and tools, and what the assistant said; of a plain text, nothing and the text.

    System turns, tool descriptions and what a template adds are not part of it: records share those.
    """
    if "text" in record:
        return "", record["text"]
    asked, answered = [], []
    for message in record["messages"]:
        if message["role"] == "assistant":
            answered.append(_said(message))
        elif message["role"] != "system":
            asked.append(_said(message))
    return "\n\n".join(asked), "\n\n".join(answered)


class _Told(dict):
    """Whether each word seen is a telling one; forgets all when it holds too many."""

    def __missing__(self, word: str) -> bool:
        if len(self) >= minhash.WORDS_REMEMBERED:
            self.clear()
        self[word] = _TELLING.fullmatch(word) is not None
        return self[word]


_told = _Told()


def telling(words: list[str]) -> tuple[str, ...]:
    """The words that make another statement of the same sentence, in order of the alphabet, as often as they come.

    They are numbers, operators, single letters (variables, choices) and words of denial.
    """
    return tuple(sorted(word for word in words if _told[word]))


def compared_words(text: str) -> list[str]:
    """Words of a text as they are compared: a contracted denial is a word, other contractions are none."""
    return minhash.words(_CONTRACTED.sub("", _DENIED.sub(" not", text)))


class Compared:
    """Words and shingles of a batch of records, both parts of each.

    Args:
        records: as `records.jsonl` holds them.
        shared: uint64, sorted, shingles that do not count.
    """

    def __init__(self, records: list[dict], shared: np.ndarray) -> None:
        parts = [asked_and_answered(record) for record in records]
        self.words = [compared_words(text) for text in chain.from_iterable(parts)]
        self.plain = np.array(["text" in record for record in records], bool)
        self.values, self.bounds = minhash.shingles(self.words)
        # The same words asked and answered are two things.
        answered = np.repeat(np.arange(len(self.words)) % 2 == 1, np.diff(self.bounds))
        self.values[answered] = minhash.mixed(self.values[answered] ^ np.uint64(_ANSWERED))
        self.values, self.bounds = minhash.without(self.values, self.bounds, shared)

    def keys(self, similarity: float) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [bands, records], and bool [records], whether a record has a shingle at all.

        Where both parts of two records reach a similarity, so do the parts together.
        """
        bounds = self.bounds[::2]
        return minhash.band_keys(minhash.signatures(self.values, bounds), similarity), np.diff(bounds) > 0

    def sides(self) -> Iterator["Side"]:
        """Each record by itself."""
        for number, plain in enumerate(self.plain):
            asked, answered = (minhash.distinct(self.values, self.bounds, 2 * number + part) for part in (0, 1))
            words = () if plain else tuple(telling(part) for part in self.words[2 * number : 2 * number + 2])
            yield Side(asked, answered, words)


@dataclass(frozen=True, slots=True)
class Side:
    """One record of a comparison.

    Args:
        asked, answered: shingles, uint64, sorted, without those that do not count unless there are no others.
        words: telling words of what was asked and of what was answered; of a plain text none.
    """

    asked: np.ndarray
    answered: np.ndarray
    words: tuple[tuple[str, ...], ...]

    def similarity(self, other: "Side") -> float:
        """The lower Jaccard similarity of what was asked and what was answered; 0 if telling words differ."""
        if self.words != other.words:
            return 0.0
        return min(minhash.jaccard(self.asked, other.asked), minhash.jaccard(self.answered, other.answered))
