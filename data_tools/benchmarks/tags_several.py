"""Made-up pools whose instances have several tags each that are true, and few labels: more pools of `tags_pools`.

The pools of real texts have many rare tags, or one tag an instance; these have neither. Labels are as frequent as
rank^-1 but for several-even. A label has four words of its own, its name is the first two of these, and a text is made
of words of its tags.

- several-words: 20 labels. Tags: the label, the two words of its name, and up to two more of its own, so 3 to 5.
- several-even: 20 labels of 100 instances each. Tags: the label and one to four of its own words, so 2 to 5.
- several-beside: 20 labels. Tags: the label, and one of 20 words that say nothing of it.
- several-topics: 20 labels. Tags: the label, and one to four of the other labels, so 2 to 5.
- several-many: 200 labels. Tags as those of several-words.
- several-families: 40 labels in 8 families. Tags: the label, its family, one of its own words, and in every second
  instance one of 200 words that say nothing of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
OWN_WORDS, FAMILIES, WORDS_A_TEXT = 4, 8, 12


class _Vocabulary:
    """Words of labels, and draws of them.

    Args:
        labels: how many.
        generator: what draws.
    """

    def __init__(self, labels: int, generator: np.random.Generator) -> None:
        self.generator = generator
        words: dict[str, None] = {}
        while len(words) < OWN_WORDS * labels + FAMILIES + 200:
            letters = zip(*(generator.integers(len(of), size=3) for of in (CONSONANTS, VOWELS)), strict=True)
            words["".join(CONSONANTS[first] + VOWELS[second] for first, second in letters)] = None
        rest = list(words)
        self.own = [[rest.pop() for _ in range(OWN_WORDS)] for _ in range(labels)]
        self.names = [" ".join(own[:2]) for own in self.own]
        self.families = [rest.pop() for _ in range(FAMILIES)]
        self.beside = rest

    def some(self, words: list[str], fewest: int, most: int) -> list[str]:
        """From `fewest` to `most` of the words, each once."""
        count = int(self.generator.integers(fewest, most + 1))
        return [words[k] for k in self.generator.permutation(len(words))[:count]]


def _words(of: _Vocabulary, label: int) -> list[str]:
    own = of.own[label]
    return [of.names[label], *own[:2], *of.some(own[2:], 0, 2)]


def _even(of: _Vocabulary, label: int) -> list[str]:
    return [of.names[label], *of.some(of.own[label], 1, 4)]


def _beside(of: _Vocabulary, label: int) -> list[str]:
    return [of.names[label], *of.some(of.beside[:20], 1, 1)]


def _topics(of: _Vocabulary, label: int) -> list[str]:
    return [of.names[label], *of.some(of.names[:label] + of.names[label + 1 :], 1, 4)]


def _families(of: _Vocabulary, label: int) -> list[str]:
    own, family = of.some(of.own[label], 1, 1), of.families[label % FAMILIES]
    return [of.names[label], family, *own, *(of.some(of.beside, 0, 1))]


@dataclass(frozen=True)
class Kind:
    """One pool.

    Args:
        labels: how many.
        instances: how many the pool has at most.
        most: rows of each label to choose from.
        tags: those of an instance of a label.
    """

    labels: int
    instances: int
    most: int
    tags: Callable[[_Vocabulary, int], list[str]]


SEVERAL = {
    "several-words": Kind(20, 2000, 600, _words),
    "several-even": Kind(20, 100_000, 100, _even),
    "several-beside": Kind(20, 2000, 600, _beside),
    "several-topics": Kind(20, 2000, 600, _topics),
    "several-many": Kind(200, 6000, 1100, _words),
    "several-families": Kind(40, 4000, 1000, _families),
}


def several(kind: Kind, generator: np.random.Generator) -> Iterator[dict]:
    """The rows to choose a pool from: `kind.most` of each label."""
    vocabulary = _Vocabulary(kind.labels, generator)
    for label in range(kind.labels):
        for _ in range(kind.most):
            tags = kind.tags(vocabulary, label)
            words = " ".join(tags).split()
            text = " ".join(words[k] for k in generator.integers(len(words), size=WORDS_A_TEXT))
            yield {"text": text, "label": vocabulary.names[label], "tags": tags}
