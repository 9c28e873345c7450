"""RULER's wording of needle tests, for a model with a tokenizer (RULER, scripts/data/synthetic/niah.py)."""

import re
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.generation import Tokens
from megatron_ksa.evaluation.needle import Form

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SINGULAR = {"numbers": "number", "uuids": "uuid", "words": "word"}


class TextLanguage:
    """Sentences in English.

    Args:
        encode: text -> token ids, without special tokens.
        decode: token ids -> text.
        essay: the text of 'essay' haystacks; read from a random sentence on, and from its start again where it ends.
            Its words of four letters or more are the keys of kind 'words'.

    Raises:
        UsageError: an essay without sentences or with too few words.
    """

    new_tokens = 128

    def __init__(self, encode: Callable[[str], Tokens], decode: Callable[[Tokens], str], essay: str) -> None:
        self.encode, self.decode = encode, decode
        self.words = sorted({word.lower() for word in re.findall(r"\b[A-Za-z]{4,12}\b", essay)})
        if len(self.words) < 100:
            raise UsageError(f"the haystack text has {len(self.words)} different words: give one with at least 100")
        self.essay = [encode(" " + text.strip()) for text in re.split(r"(?<=[.!?])\s+", essay) if text.strip()]
        self.noise = encode(" " + NOISE)

    def item(self, kind: str, random: np.random.Generator) -> str:
        """A pair of words, a number of seven digits, or a UUID."""
        if kind == "numbers":
            return str(random.integers(10**6, 10**7))
        if kind == "uuids":
            return str(uuid.UUID(bytes=random.bytes(16), version=4))
        return "-".join(random.choice(self.words, 2))

    def random_words(self, random: np.random.Generator) -> Iterator[str]:
        """Different words without end: the essay's in random order, then syllables put together."""
        given = random.permutation(self.words).tolist()
        yield from given
        used = set(given)
        while True:
            syllables = zip(random.choice(list("bdfgklmnprstvz"), 4), random.choice(list("aeiou"), 4), strict=True)
            word = "".join(letter for syllable in syllables for letter in syllable)
            if word not in used:
                used.add(word)
                yield word

    def needle(self, key: str, value: str, form: Form) -> Tokens:
        """The sentence that tells the key's value."""
        return self.encode(f" One of the special magic {form.values} for {key} is: {value}.")

    def sentences(self, haystack: str, tokens: int, random: np.random.Generator) -> list[Tokens]:
        """Sentences, together at most `tokens` tokens."""
        source = [self.noise] if haystack == "noise" else self.essay
        index, chosen = int(random.integers(len(source))), []
        while len(source[index % len(source)]) <= tokens:
            chosen.append(source[index % len(source)])
            tokens -= len(chosen[-1])
            index += 1
        return chosen

    def opening(self, form: Form) -> Tokens:
        """The instruction."""
        many = form.asked * form.values_per_key > 1
        named = form.values if many else SINGULAR[form.values]
        verb = "are" if many else "is"
        return self.encode(
            f"{'Some' if many else 'A'} special magic {named} {verb} hidden within the following text. Make sure to "
            "memorize "
            f"it. I will quiz you about the {named} afterwards.\n"
        )

    def question(self, keys: list[str], form: Form) -> Tokens:
        """The question and the beginning of its answer."""
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        many = form.asked * form.values_per_key > 1
        named, verb = (form.values, "are") if many else (SINGULAR[form.values], "is")
        return self.encode(
            f"\nWhat {verb} {'all ' if many else ''}the special magic {named} for {query} mentioned in the provided "
            "text? "
            f"The special magic {named} for {query} mentioned in the provided text {verb}"
        )

    def answer(self, values: list[str]) -> list[Tokens]:
        """' v1, v2, and v3', a piece a value."""
        last = len(values) - 1
        joints = [" " if i == 0 else ", and " if i == last else ", " for i in range(len(values))]
        return [self.encode(joint + value) for joint, value in zip(joints, values, strict=True)]

    def spelling(self, value: str) -> str:
        """The value itself."""
        return value
