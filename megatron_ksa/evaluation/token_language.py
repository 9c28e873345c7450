"""A language of token ids with long-range structure, for small models trained from scratch: needle tests and training text.

Ids: 0 ends a document, 1 to 7 are marks, 256 bytes follow, then words. In a phrase every second word or so follows from
the word before the last, so that a small model soon learns to look at the tokens before, which copying builds on. A
document's text repeats phrases: the chance of a phrase that it has not used yet falls with its length, so that more
context always predicts better. Between phrases stand needles `KEY k IS v END`, and later questions about them,
`ASK k IS v END`.
"""

import numpy as np

from megatron_ksa.evaluation.needle import FORMS, Form, Tokens

END_OF_DOCUMENT, KEY, IS, END, ASK, AND, DOT = range(7)
BYTES = 8
WORDS = BYTES + 256
NUM_WORDS = 248
VOCABULARY = WORDS + NUM_WORDS
PHRASE = 8
# A phrase is new with probability NOVELTY / (NOVELTY + phrases so far).
NOVELTY = 8
# The word that follows two places after each word, where it follows from it at all.
SUCCESSOR = WORDS + np.random.default_rng(0).permutation(NUM_WORDS)
FOLLOWS = 0.5


class TokenLanguage:
    """Needle tests and documents in token ids; items are strings of ids with spaces."""

    def item(self, kind: str, random: np.random.Generator) -> str:
        """Two words, or a number of two bytes, or an identifier of four."""
        low, high, size = {"words": (WORDS, VOCABULARY, 2), "numbers": (BYTES, WORDS, 2), "uuids": (BYTES, WORDS, 4)}[kind]
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

    def document(self, tokens: int, random: np.random.Generator) -> np.ndarray:
        """A training document: uint16 [about tokens]; blocks of text, each of a random needle form with its question.

        Most blocks span the whole document's earlier text, so that questions reach as far back as it is long.
        """
        body = tokens // 2
        phrases = self.sentences("essay", body, random)
        inserts: list[tuple[float, Tokens]] = []
        budget = tokens - len(phrases) * (PHRASE + 1)
        while budget > 0:
            form = list(FORMS.values())[random.integers(len(FORMS))]
            keys = [self.item(form.keys, random) for _ in range(form.needles)]
            places = np.sort(random.random(3))
            pairs = [(k, self.item(form.values, random)) for k in keys for _ in range(form.values_per_key)]
            spots = places[0] + (places[1] - places[0]) * np.sort(random.random(len(pairs)))
            asked = keys[: form.asked]
            said = [v for k, v in pairs if k in asked]
            block = [(float(s), self.needle(k, v, form)) for s, (k, v) in zip(spots, pairs, strict=True)]
            question = self.question(asked, form) + [t for piece in self.answer(said) for t in piece]
            block.append((float(places[2]), question))
            inserts += block
            budget -= sum(len(part) for _, part in block)
        spread = [((i + 0.5) / max(len(phrases), 1), phrase) for i, phrase in enumerate(phrases)]
        ordered = sorted([*spread, *inserts], key=lambda part: part[0])
        ids = [token for _, part in ordered for token in part][: tokens - 1]
        return np.array([*ids, END_OF_DOCUMENT], dtype=np.int32)


def _ids(item: str) -> Tokens:
    return [int(token) for token in item.split()]
