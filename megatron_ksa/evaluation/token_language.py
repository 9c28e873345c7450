"""A language of token ids with long-range structure, for small models trained from scratch: needles, training text.

Ids: 0 ends a document, 1 to 7 are marks, then 256 bytes, 256 parts of names, and words. In a phrase every second word
or so follows from the word before the last, so that a small model soon learns to look at the tokens before, which
copying builds on. A document's text repeats phrases: the chance of a phrase that it has not used yet falls with its
length, so that more context always predicts better. Between phrases stand needles `KEY k IS v END`, and later questions
about them, `ASK k IS v END`.
"""

import numpy as np

from megatron_ksa.evaluation.generation import Tokens
from megatron_ksa.evaluation.needle import FORMS, Form

END_OF_DOCUMENT, KEY, IS, END, ASK, AND, DOT = range(7)
BYTES = 8
NAMES = BYTES + 256
WORDS = NAMES + 256
NUM_WORDS = 248
VOCABULARY = WORDS + NUM_WORDS
PHRASE = 8
# A phrase is new with probability NOVELTY / (NOVELTY + phrases so far).
NOVELTY = 8
# SUCCESSOR[w - WORDS] stands two places after the word w with probability FOLLOWS; else the place's word is random.
SUCCESSOR = WORDS + np.random.default_rng(0).permutation(NUM_WORDS)
FOLLOWS = 0.5
# Needles and questions are this share of a training document, drawn evenly: tests have haystacks of text and of
# needles.
INSERTS = (0.1, 0.9)
# A needle stands u ** 3 of the reach before its question, u uniform in [0, 1]: half of the needles stand within an
# eighth of the reach.
NEARNESS = 3


class TokenLanguage:
    """Needle tests and documents in token ids; items are strings of ids with spaces."""

    new_tokens = 0

    def item(self, kind: str, random: np.random.Generator) -> str:
        """A name of two parts, or a number of two bytes, or an identifier of four."""
        low, high, size = {"words": (NAMES, WORDS, 2), "numbers": (BYTES, NAMES, 2), "uuids": (BYTES, NAMES, 4)}[kind]
        return " ".join(map(str, random.integers(low, high, size)))

    def needle(self, key: str, value: str, form: Form) -> Tokens:
        """KEY k IS v END."""
        return [KEY, *_ids(key), IS, *_ids(value), END]

    def sentences(self, haystack: str, tokens: int, random: np.random.Generator) -> list[Tokens]:
        """Phrases; of a 'noise' haystack always the same one."""
        count = tokens // (PHRASE + 1)
        phrases: list[Tokens] = []
        for index in range(count):
            if phrases and (haystack == "noise" or random.random() >= NOVELTY / (NOVELTY + index)):
                phrases.append(phrases[0 if haystack == "noise" else random.integers(len(phrases))])
            else:
                phrases.append(self._phrase(random))
        return phrases

    def _phrase(self, random: np.random.Generator) -> Tokens:
        words = random.integers(WORDS, VOCABULARY, PHRASE)
        for place in np.flatnonzero(random.random(PHRASE) < FOLLOWS):
            if place >= 2:
                words[place] = SUCCESSOR[words[place - 2] - WORDS]
        return [*words.tolist(), DOT]

    def opening(self, form: Form) -> Tokens:
        """Nothing: the model has no instructions."""
        return []

    def question(self, keys: list[str], form: Form) -> Tokens:
        """ASK k1 AND k2 IS."""
        ids = [token for key in keys for token in (AND, *_ids(key))]
        return [ASK, *ids[1:], IS]

    def answer(self, values: list[str]) -> list[Tokens]:
        """v1 AND v2 END, a piece a value."""
        return [[*_ids(value), END if i == len(values) - 1 else AND] for i, value in enumerate(values)]

    def decode(self, tokens: Tokens) -> str:
        """Ids, each with a space around it."""
        return "".join(f" {token}" for token in tokens) + " "

    def spelling(self, value: str) -> str:
        """The value's ids, whole ones."""
        return f" {value} "

    def document(self, tokens: int, random: np.random.Generator, reach: int | None = None) -> np.ndarray:
        """A training document: int32 [about tokens]; text, and blocks of a random needle form with its question.

        Args:
            reach: tokens before a question that its needles stand within; None for the whole document before it.
        """
        body = int(tokens * (1 - random.uniform(*INSERTS)))
        phrases = self.sentences("noise" if random.random() < 1 / len(FORMS) else "essay", body, random)
        inserts: list[tuple[float, Tokens]] = []
        budget = tokens - len(phrases) * (PHRASE + 1)
        while budget > 0:
            form = list(FORMS.values())[random.integers(len(FORMS))]
            keys = [self.item(form.keys, random) for _ in range(form.needles)]
            pairs = [(k, self.item(form.values, random)) for k in keys for _ in range(form.values_per_key)]
            place = float(random.random())
            span = min(place, (reach or tokens) / tokens)
            spots = place - span * random.random(len(pairs)) ** NEARNESS
            if form.values_per_key > 1:  # the answer tells the values in the order in which they stand
                spots.sort()
            asked = keys[: form.asked]
            said = [v for k, v in pairs if k in asked]
            block = [(float(spot), self.needle(k, v, form)) for spot, (k, v) in zip(spots, pairs, strict=True)]
            question = self.question(asked, form) + [t for piece in self.answer(said) for t in piece]
            block.append((place, question))
            inserts += block
            budget -= sum(len(part) for _, part in block)
        spread = [((i + 0.5) / max(len(phrases), 1), phrase) for i, phrase in enumerate(phrases)]
        ordered = sorted([*spread, *inserts], key=lambda part: part[0])
        ids = [token for _, part in ordered for token in part][: tokens - 1]
        return np.array([*ids, END_OF_DOCUMENT], dtype=np.int32)


def _ids(item: str) -> Tokens:
    return [int(token) for token in item.split()]
