"""Offline tagger: the phrases of an instance that scikit-learn's TF-IDF over the pool finds most telling.

The weaker choice beside an LLM: it names what is written, not what is meant, knows no synonyms and no difficulty, and
its stop words, verbs and adjectives are English. Phrases come from the whole pool, so that instances share them, as a
tree needs. `examples/tags/README.md` compares it with keyphrase libraries.
"""

from collections.abc import Iterator
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import MAX_TAG_CHARACTERS, record_text
from megatron_ksa.data_tools.tags.taggers import Answer, Failure
from megatron_ksa.data_tools.tags.taggers.segment import SEGMENTERS, UNSPACED, check_segmenter, segments
from megatron_ksa.data_tools.tags.taggers.words import is_adjective, plain, runs
from megatron_ksa.errors import UsageError

SAMPLE = 200_000
CHARACTERS = 4_000
WORDS = 3
RECORDS_PER_TASK = 256
# A phrase of n words counts 1 + LONGER * (n - 1) times its TF-IDF: it says more than its words.
LONGER = 0.5
# A phrase in more than this share of a pool of MANY or more records is its template, not a topic.
COMMON, MANY = 0.2, 1000
# An n-gram of characters is part of a word if a longer one has this share of its records.
CONTAINED = 0.9
UNSHARED = "no phrase that another record shares"


def phrases(text: str, segmenter: str = SEGMENTERS[0]) -> list[str]:
    """Candidates for tags: runs of 1 to 3 words that end in no adjective, in lower case, and words of scripts without
    spaces (`segment.py`)."""
    found = []
    for run in runs(UNSPACED.sub("\n", text)):
        for end, word in enumerate(run, start=1):
            if is_adjective(word):
                continue
            for length in range(1, min(WORDS, end) + 1):
                phrase = " ".join(run[end - length : end])
                if len(phrase) <= MAX_TAG_CHARACTERS:
                    found.append(phrase)
    for match in UNSPACED.finditer(plain(text)):
        found += segments(match[0], segmenter)
    return found


class _Phrases:
    """`phrases` of the first characters of a text, as scikit-learn's analyzer."""

    def __init__(self, segmenter: str) -> None:
        self.segmenter = segmenter

    def __call__(self, text: str) -> list[str]:
        return phrases(text[:CHARACTERS], self.segmenter)


def contained_grams(names: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool [names]: n-grams of a script without spaces that hardly occur outside a longer one.

    Args:
        names: str [names], phrases of the pool.
        counts: float [names], in proportion to the records of each.
    """
    place = {name: number for number, name in enumerate(names) if UNSPACED.fullmatch(name)}
    inside = np.zeros(len(names), bool)
    for name, number in place.items():
        for start in range(len(name)):
            for end in range(start + 2, len(name) + 1):
                part = place.get(name[start:end], number)
                if part != number and counts[number] >= CONTAINED * counts[part]:
                    inside[part] = True
    return inside


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
            (value * (1 + LONGER * name.count(" ")), name)
            for value, name in zip(values, names[columns], strict=True) if name
        ]  # fmt: skip
        tags = _best(scored, count)
        results.append(Answer(tags) if tags else Failure("no keyphrase", UNSHARED))
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

    def __init__(
        self, count: int, engine: Engine, spread: int = 2, pool: Path | None = None, segmenter: str = SEGMENTERS[0]
    ) -> None:
        if count < 1:
            raise UsageError(f"--tags-per-record {count}: at least 1")
        check_segmenter(segmenter)
        self.count, self.engine, self.spread, self.pool, self.segmenter = count, engine, spread, pool, segmenter

    def settings(self) -> dict:
        """Everything that decides the answers."""
        return {
            "tagger": "keyphrase",
            "rules": 2,
            "tags": self.count,
            "spread": self.spread,
            "sample": SAMPLE,
            "characters": CHARACTERS,
            "segmenter": self.segmenter,
        }

    def _fit(self, records: Path) -> tuple[TfidfVectorizer, np.ndarray]:
        """TF-IDF of the pool's phrases, and which of them may be tags, bool [phrases]."""
        with open(records, "rb") as stream:
            total = sum(1 for _ in stream)
        step = -(-total // SAMPLE)
        rows = tqdm(read_jsonl(records), total=total, desc="find phrases", unit=" records")
        texts = (record_text(record) for number, record in enumerate(rows) if number % step == 0)
        spread = self.spread if total >= 10 else 1
        most = COMMON if total >= MANY else 1.0
        vectorizer = TfidfVectorizer(
            analyzer=_Phrases(self.segmenter), min_df=spread, max_df=most, sublinear_tf=True, dtype=np.float32
        )
        vectorizer.fit(texts)
        # idf = ln((1 + n) / (1 + records)) + 1, so that these are in proportion to 1 + records.
        counts = np.exp(1 - vectorizer.idf_)
        # Its root instead: phrases that more records share make better tags (examples/tags/README.md).
        vectorizer.idf_ = np.sqrt(vectorizer.idf_)
        allowed = ~contained_grams(vectorizer.get_feature_names_out(), counts)
        return vectorizer, allowed

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order."""
        try:
            vectorizer, allowed = self._fit(self.pool or records)
        except ValueError:
            # scikit-learn's word for texts without a phrase, or without one that is shared.
            yield from (Failure("no keyphrase", UNSHARED) for _ in range(total))
            return
        names = np.where(allowed, vectorizer.get_feature_names_out(), "")
        tag = partial(_tag, vectorizer=vectorizer, names=names, count=self.count)
        for results in self.engine.map(tag, batched(read_jsonl(records), RECORDS_PER_TASK)):
            yield from results

    def totals(self) -> dict:
        """Nothing is spent."""
        return {}
