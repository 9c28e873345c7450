"""Which texts of a pool hold an evaluation's questions: an index of the questions, and what it finds in a batch.

A question is held by a text if runs of 8 words that both have cover enough of the question's words, and it is like a
text's own question if runs of 3 words have a Jaccard similarity that is high enough. Either way the text has the
question's numbers, operators and single letters: a task with other numbers is another task. Runs that several
questions share are a benchmark's template and do not count; a question without any other run, or of fewer words than a
run has, is held by a text only as a whole.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from megatron_ksa.data_tools.tags import minhash
from megatron_ksa.data_tools.tags.compared import asked_and_answered, compared_words, telling

RUN_WORDS, ALIKE_WORDS = 8, 3
# Shorter questions ("Why?") are found in any pool.
LEAST_WORDS = 4
# A run of so many different questions is a template's.
SHARED_QUESTIONS, SHARED_SHARE = 3, 0.01
NGRAM, MINHASH = "n-gram", "minhash"
EXCERPT_WORDS = 40


@dataclass(frozen=True)
class Question:
    """What an evaluation asks: where it comes from, its id, its words and its telling words."""

    source: str
    id: str
    words: list[str]
    telling: Counter

    @classmethod
    def of(cls, record: dict, source: str) -> "Question":
        """The user's turns of a record, or its text."""
        asked, answered = asked_and_answered(record)
        words = compared_words(asked or answered)
        return cls(source, record["id"], words, Counter(telling(words)))


@dataclass(frozen=True)
class Found:
    """A question that a text holds.

    Args:
        text: number of the text in its batch.
        question: number of the question.
        reason: `NGRAM` or `MINHASH`.
        overlap: share of the question's words that shared runs cover, or the Jaccard similarity.
        words, question_words: of both sides, what matches.
    """

    text: int
    question: int
    reason: str
    overlap: float
    words: str
    question_words: str


class QuestionIndex:
    """The questions of evaluations, to look texts up in.

    Args:
        questions: of at least `LEAST_WORDS` words each.
        overlap: share of a question's words from which a text holds it.
        similarity: Jaccard similarity from which a text's own question is the same.
    """

    def __init__(self, questions: list[Question], overlap: float, similarity: float) -> None:
        self.questions, self.overlap, self.similarity = questions, overlap, similarity
        self._runs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._countable = [np.zeros(len(question.words), bool) for question in questions]
        shared, self._shared_alike = self._shared(RUN_WORDS), self._shared(ALIKE_WORDS)
        by_size: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
        for number, question in enumerate(questions):
            size = min(RUN_WORDS, len(question.words))
            values = minhash.shingles([question.words], size)[0]
            places = np.flatnonzero(~minhash.is_among(values, shared)) if size == RUN_WORDS else np.arange(1)
            if not len(places):
                # Nothing but a template: the whole question, and no less, is a run.
                size, places = len(question.words), np.arange(1)
                values = minhash.shingles([question.words], size)[0]
            for place in places:
                self._countable[number][place : place + size] = True
            by_size[size].append((number, places, values[places]))
        for size, rows in by_size.items():
            values = np.concatenate([row[2] for row in rows])
            order = np.argsort(values, kind="stable")
            owner = np.concatenate([np.full(len(places), number) for number, places, _ in rows])
            self._runs[size] = values[order], owner[order], np.concatenate([places for _, places, _ in rows])[order]
        alike = self._alike([question.words for question in questions])
        self._sets = [minhash.distinct(*alike, number) for number in range(len(questions))]
        keys = minhash.band_keys(minhash.signatures(*alike), similarity)
        order = np.argsort(keys, axis=1, kind="stable")
        self._bands = [(row[places], places) for row, places in zip(keys, order, strict=True)]

    def _shared(self, size: int) -> np.ndarray:
        """Runs of several different questions: uint64, sorted."""
        different = {tuple(question.words) for question in self.questions if len(question.words) >= size}
        values, bounds = minhash.shingles(list(map(list, different)), size)
        sets = [minhash.distinct(values, bounds, number) for number in range(len(different))]
        found, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *sets]), return_counts=True)
        return found[counts >= max(SHARED_QUESTIONS, SHARED_SHARE * len(different))]

    def _alike(self, words: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        return minhash.without(*minhash.shingles(words, ALIKE_WORDS), self._shared_alike)

    def search(self, records: list[dict]) -> list[Found]:
        """For each record that holds a question, the one that it holds most of."""
        parts = [asked_and_answered(record) for record in records]
        asked = [compared_words(question or text) for question, text in parts]
        texts = [words + compared_words(answer) if question else words
                 for words, (question, answer) in zip(asked, parts, strict=True)]  # fmt: skip
        best: dict[int, Found] = {}
        for found in (*self._held(texts), *self._alike_ones(asked)):
            if found.text not in best or found.overlap > best[found.text].overlap:
                best[found.text] = found
        return [best[text] for text in sorted(best)]

    def _held(self, texts: list[list[str]]) -> list[Found]:
        """Questions that the texts hold runs of."""
        matches: dict[tuple[int, int], dict[int, tuple[int, int]]] = defaultdict(dict)
        for size, (table, owner, place) in self._runs.items():
            values, bounds = minhash.shingles(texts, size)
            first = np.searchsorted(table, values)
            last = np.searchsorted(table, values, side="right")
            for hit in np.flatnonzero(last > first).tolist():
                text = int(np.searchsorted(bounds, hit, side="right")) - 1
                for row in range(first[hit], last[hit]):
                    matches[text, int(owner[row])].setdefault(int(place[row]), (hit - int(bounds[text]), size))
        found = []
        for (text, question), runs in matches.items():
            covered = np.zeros(len(self.questions[question].words), bool)
            spans = [(place, place + size) for place, (_, size) in runs.items()]
            for start, end in spans:
                covered[start:end] = True
            share = float(covered.sum() / self._countable[question].sum())
            if share >= self.overlap and not self.questions[question].telling - Counter(telling(texts[text])):
                own = [(start, start + size) for start, size in runs.values()]
                found.append(Found(
                    text, question, NGRAM, share, _excerpt(texts[text], own),
                    _excerpt(self.questions[question].words, spans),
                ))  # fmt: skip
        return found

    def _alike_ones(self, asked: list[list[str]]) -> list[Found]:
        """Questions that are like the texts' own."""
        values, bounds = self._alike(asked)
        keys = minhash.band_keys(minhash.signatures(values, bounds), self.similarity)
        candidates: set[tuple[int, int]] = set()
        for row, (table, order) in zip(keys, self._bands, strict=True):
            first, last = np.searchsorted(table, row), np.searchsorted(table, row, side="right")
            for text in np.flatnonzero(last > first).tolist():
                candidates.update((text, int(question)) for question in order[first[text] : last[text]])
        found = []
        for text, question in sorted(candidates):
            words, own = self.questions[question].words, asked[text]
            near = minhash.jaccard(minhash.distinct(values, bounds, text), self._sets[question])
            if near >= self.similarity and self.questions[question].telling == Counter(telling(own)):
                found.append(Found(
                    text, question, MINHASH, near, " ".join(own[:EXCERPT_WORDS]), " ".join(words[:EXCERPT_WORDS])
                ))  # fmt: skip
        return found


def _excerpt(words: list[str], spans: list[tuple[int, int]]) -> str:
    """From the first to the last word that matches."""
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return " ".join(words[first : min(last, first + EXCERPT_WORDS)])
