"""RULER's tasks beyond needles (Hsieh et al. 2024, arXiv 2404.06654), in its wording, built in tokens.

| task | the text holds | asked for |
|---|---|---|
| `vt` | a chain `VAR A = 12345`, `VAR B = VAR A`, ... among repeated sentences | every variable of the chain |
| `cwe` | a numbered list in which ten words stand more often than the others | those ten |
| `fwe` | coded words whose frequency falls with the square of their rank | ranks 2 to 4; rank 1 is `...` |
| `qa` | documents, one of which has the answer (`questions.py`) | the answer |

`vt` and `cwe` begin with a short solved example, as RULER's do. Every piece of a prompt is encoded by itself, so that
lengths add up and a prompt is never longer than asked for, what the model may write included.
"""

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.generation import Tokens
from megatron_ksa.evaluation.needle import FORMS, build_case
from megatron_ksa.evaluation.questions import Question, Questions
from megatron_ksa.evaluation.string_match import all_parts, any_part
from megatron_ksa.evaluation.text_language import NOISE, TextLanguage

HOPS = 4
COMMON = 10
# Below it RULER's lists of common words are shorter, so that they fit.
SHORT = 4096
# Variables and coded words: letters in one.
VARIABLE, CODED = 5, 6


@dataclass(frozen=True)
class Sample:
    """One case of a task.

    Attributes:
        answers: what the text that the model writes should contain.
        new_tokens: that the model may write; with the prompt they are within the length.
        score: of a text against the answers, 0 to 1.
    """

    prompt: Tokens
    answers: tuple[str, ...]
    new_tokens: int
    score: Callable[[str, Sequence[str]], float] = all_parts


def _letters(size: int, alphabet: str, random: np.random.Generator) -> str:
    return "".join(random.choice(list(alphabet), size))


def _distinct(count: int, size: int, alphabet: str, random: np.random.Generator) -> list[str]:
    """Random words, each another."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[_letters(size, alphabet, random)] = None
    return list(words)


class TooShortError(UsageError):
    """A length that does not hold a task's least prompt."""


def _too_short(task: str, length: int, missing: int) -> TooShortError:
    return TooShortError(f"{length} tokens are too few for {task}: {length + missing} are needed at least")


def _chain(
    encode: Callable[[str], Tokens], length: int | None, taken: int, random: np.random.Generator
) -> tuple[Tokens, list[str]]:
    """A text with a chain of variables and its question, and the variables.

    Args:
        length: tokens of the whole prompt, of which `taken` are taken; None for the shortest text, one sentence more
            than assignments.

    Raises:
        UsageError: too short a length.
    """
    names, value = _distinct(HOPS + 1, VARIABLE, string.ascii_uppercase, random), random.integers(10000, 99999)
    links = [f" VAR {names[0]} = {value}"] + [f" VAR {new} = VAR {old} " for old, new in pairwise(names)]
    chained, noise = [encode(text) for text in links], encode(f" {NOISE}\n")
    before = encode("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n")
    after = encode(
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value},"
        " they are:"
    )
    count = len(links) + 1
    if length is not None:
        room = length - taken - len(before) - len(after) - sum(map(len, chained))
        count = room // len(noise)
        if count < 1:
            raise _too_short("vt", length, len(noise) - room)
    places = np.sort(random.integers(0, count + 1, len(links)))
    text: Tokens = []
    for index in range(count + 1):
        for piece in (chained[i] for i in np.flatnonzero(places == index)):
            text += piece
        text += noise if index < count else []
    return before + text + after, names


def variable_tracking(language: TextLanguage, length: int, random: np.random.Generator) -> Sample:
    """RULER's `vt`: one chain of four hops, behind a solved example."""
    encode, new_tokens = language.encode, 30
    example, names = _chain(encode, None, 0, random)
    shown = example + encode(" " + " ".join(names) + "\n\n")
    prompt, names = _chain(encode, length, new_tokens + len(shown), random)
    return Sample(shown + prompt, tuple(names), new_tokens)


def _word_list(
    encode: Callable[[str], Tokens], words: Iterator[str], often: int, seldom: int, room: int,
    random: np.random.Generator,
) -> tuple[Tokens, list[str]] | None:  # fmt: skip
    """A numbered list with its question, and the common words; None where these alone do not fit.

    Args:
        words: different ones, in random order: the first ten are common; of the others as many are taken as fit.
        often, seldom: how many times each of both stands in it.
        room: tokens.
    """
    before = encode(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    after = encode(
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )
    room -= len(before) + len(after)
    common, numbers, spelled = list(islice(words, COMMON)), [], []
    for index, word in enumerate(chain(common, words)):
        times, tokens = often if index < COMMON else seldom, encode(f" {word}")
        new = [encode(f" {len(numbers) + i}.") for i in range(1, times + 1)]
        room -= sum(map(len, new)) + times * len(tokens)
        if room < 0:
            break
        numbers += new
        spelled += [tokens] * times
    if len(numbers) < COMMON * often:
        return None
    order = random.permutation(len(spelled))
    text = [token for number, i in zip(numbers, order, strict=True) for token in number + spelled[i]]
    return before + text + after, common


def common_words(language: TextLanguage, length: int, random: np.random.Generator) -> Sample:
    """RULER's `cwe`: ten words 30 times among others that stand 3 times; 6 times and once below 4,096 tokens.

    The solved example has 10 words more, or 30.
    """
    encode, new_tokens, words = language.encode, 120, language.random_words(random)
    short = length < SHORT
    example = islice(words, 2 * COMMON if short else 4 * COMMON)
    shown, common = _word_list(encode, example, *((3, 1) if short else (10, 3)), 10 * SHORT, random)
    shown = shown + encode("".join(f" {i}. {word}" for i, word in enumerate(common, start=1)) + "\n")
    made = _word_list(encode, words, *((6, 1) if short else (30, 3)), length - new_tokens - len(shown), random)
    if made is None:
        raise UsageError(f"{length} tokens are too few for cwe: its ten common words alone take more")
    return Sample(shown + made[0], tuple(made[1]), new_tokens)


def frequent_words(language: TextLanguage, length: int, random: np.random.Generator) -> Sample:
    """RULER's `fwe`: the word of rank k stands about N / (zeta(2) k^2) times, N as large as fits."""
    encode, new_tokens = language.encode, 50
    before = encode(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words."
    )
    after = encode(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    words = ["...", *_distinct(max(length // 50, 8) - 1, CODED, string.ascii_lowercase, random)]
    spelled = [encode(f" {word}") for word in words]
    costs, ranks = np.array([len(tokens) for tokens in spelled]), np.arange(1, len(words) + 1)
    room = length - new_tokens - len(before) - len(after)

    def counts(size: int) -> np.ndarray:
        return (size / (ranks**2 * math.pi**2 / 6)).astype(int)

    low, high = 0, max(room, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if counts(middle) @ costs <= room else (low, middle)
    times = counts(low)
    # Otherwise a word of rank 5 stands as often as one of the answers.
    if room < 0 or times[3] <= times[4]:
        raise UsageError(f"{length} tokens are too few for fwe: its words stand {times[3]} times and fewer")
    order = random.permutation(np.repeat(np.arange(len(words)), times))
    return Sample(before + [t for i in order for t in spelled[i]] + after, tuple(words[1:4]), new_tokens)


def question_answering(
    language: TextLanguage, questions: Questions, question: Question, length: int, random: np.random.Generator
) -> Sample:
    """RULER's `qa`: the question's own documents among those of other questions, which fill the length."""
    encode, new_tokens = language.encode, 32
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    before = encode(f"{task}\n\nThe following are given documents.\n\n")
    after = encode(f"{task}\n\nQuestion: {question.text} Answer:")
    room = length - new_tokens - len(before) - len(after)

    def document(number: int, text: str) -> Tokens:
        return encode(f"Document {number}:\n{text}\n\n")

    # Numbers are given in the end: as many digits as the largest one has are paid for.
    chosen = list(question.documents)
    room -= sum(len(document(99999, text)) for text in chosen)
    if room < 0:
        raise _too_short("this question", length, -room)
    own = set(question.documents)
    others = [text for text in questions.documents if text not in own]
    costs = [len(document(99999, text)) for text in others]
    # A file with too few documents repeats them, as RULER does.
    while others and room >= 0:
        for index in random.permutation(len(others)):
            room -= costs[index]
            if room < 0:
                break
            chosen.append(others[index])
    order = random.permutation(len(chosen))
    texts = [t for number, i in enumerate(order, start=1) for t in document(number, chosen[i])]
    return Sample(before + texts + after, question.answers, new_tokens, any_part)


def needle(form: str) -> Callable[[TextLanguage, int, np.random.Generator], Sample]:
    """The task of a form of the needle test, its first needle at a random depth."""

    def build(language: TextLanguage, length: int, random: np.random.Generator) -> Sample:
        case = build_case(FORMS[form], language, length, float(random.random()), random, decoded=True)
        return Sample(case.prompt, case.values, case.new_tokens)

    return build


TASKS: dict[str, Callable[[TextLanguage, int, np.random.Generator], Sample]] = {
    **{f"niah_{form}": needle(form) for form in FORMS},
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
}
