"""Offline tagger: the phrases of an instance that scikit-learn's TF-IDF over the pool finds most telling.

The weaker choice beside an LLM: it names what is written, not what is meant, knows no synonyms, scores neither
quality nor difficulty, and its stop words are English. Phrases come from the whole pool, so that instances share
them, as a tree needs.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from tqdm import tqdm

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import MAX_TAG_CHARACTERS, record_text
from megatron_ksa.data_tools.tags.taggers import Answer, Failure
from megatron_ksa.errors import UsageError

SAMPLE = 200_000
CHARACTERS = 4_000
WORDS = 3
RECORDS_PER_TASK = 256
# A phrase of n words counts 1 + LONGER * (n - 1) times its TF-IDF: it says more than its words.
LONGER = 0.5
_WORD = re.compile(r"[^\W_](?:[\w+#'’-]*[\w+#])?", re.UNICODE)
_BREAK = re.compile(r"[^\w+#'’\-\s]|\n")


def phrases(text: str) -> list[str]:
    """Runs of 1 to 3 words without stop words, numbers alone or punctuation between them, in lower case."""
    found = []
    for part in _BREAK.split(text.lower()):
        run: list[str] = []
        for word in (*_WORD.findall(part), ""):
            if word and len(word) > 1 and not word.isdigit() and word not in ENGLISH_STOP_WORDS:
                run.append(word)
                for length in range(1, min(WORDS, len(run)) + 1):
                    phrase = " ".join(run[-length:])
                    if len(phrase) <= MAX_TAG_CHARACTERS:
                        found.append(phrase)
            else:
                run = []
    return found


class _Phrases:
    """`phrases` of the first characters of a text, as scikit-learn's analyzer."""

    def __call__(self, text: str) -> list[str]:
        return phrases(text[:CHARACTERS])


def _best(row_phrases: list[tuple[float, str]], count: int) -> list[str]:
    """The best phrases, none a part of a better one."""
    kept: list[str] = []
    for _, phrase in sorted(row_phrases, key=lambda pair: (-pair[0], pair[1])):
        if not any(f" {phrase} " in f" {other} " or f" {other} " in f" {phrase} " for other in kept):
            kept.append(phrase)
            if len(kept) == count:
                break
    return kept


def _tag(
    records: tuple[dict, ...], vectorizer: TfidfVectorizer, names: np.ndarray, count: int
) -> list[Answer | Failure]:
    matrix = vectorizer.transform(record_text(record) for record in records)
    results: list[Answer | Failure] = []
    for row in range(len(records)):
        columns = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        values = matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]]
        scored = [
            (value * (1 + LONGER * name.count(" ")), name) for value, name in zip(values, names[columns], strict=True)
        ]
        tags = _best(scored, count)
        results.append(Answer(tags) if tags else Failure("no keyphrase", "no phrase that another record shares"))
    return results


class KeyphraseTagger:
    """Names the `count` best phrases of each record, learned from the records themselves.

    Args:
        count: tags of a record, at most.
        engine: where records are tagged.
        spread: records among which a phrase must occur to be a tag (1 where there are fewer than 10).
        pool: `records.jsonl` to learn phrases from; the records that are tagged where it is None. A target is tagged
        with
            its pool's phrases, or it would have few tags in common with it.
    """

    def __init__(self, count: int, engine: Engine, spread: int = 2, pool: Path | None = None) -> None:
        if count < 1:
            raise UsageError(f"--tags-per-record {count}: at least 1")
        self.count, self.engine, self.spread, self.pool = count, engine, spread, pool

    def settings(self) -> dict:
        """Everything that decides the answers."""
        return {
            "tagger": "keyphrase",
            "tags": self.count,
            "spread": self.spread,
            "sample": SAMPLE,
            "characters": CHARACTERS,
        }

    def _fit(self, records: Path) -> TfidfVectorizer:
        with open(records, "rb") as stream:
            total = sum(1 for _ in stream)
        step = -(-total // SAMPLE)
        rows = tqdm(read_jsonl(records), total=total, desc="find phrases", unit=" records")
        texts = (record_text(record) for number, record in enumerate(rows) if number % step == 0)
        spread = self.spread if total >= 10 else 1
        vectorizer = TfidfVectorizer(analyzer=_Phrases(), min_df=spread, sublinear_tf=True, dtype=np.float32)
        return vectorizer.fit(texts)

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order."""
        try:
            vectorizer = self._fit(self.pool or records)
        except ValueError as error:
            # scikit-learn's word for texts without a phrase, or without one that is shared.
            yield from (Failure("no keyphrase", str(error)) for _ in range(total))
            return
        tag = partial(_tag, vectorizer=vectorizer, names=vectorizer.get_feature_names_out(), count=self.count)
        for results in self.engine.map(tag, batched(read_jsonl(records), RECORDS_PER_TASK)):
            yield from results

    def totals(self) -> dict:
        """Nothing is spent."""
        return {}
