"""RULER's eight needle-in-a-haystack forms (Hsieh et al. 2024, arXiv 2404.06654), built in tokens.

Without a decoder a case is scored in one forward pass with its answer teacher-forced: the reference answer is appended,
and the most likely token is read at each of its positions. All of them are right exactly when greedy decoding writes
the reference answer, since up to the first difference both see the same tokens; so `exact` is the exact match of greedy
decoding. `values` is the share of single values whose tokens are all right after the reference's preceding ones, which
for several values is kinder than decoding freely.

With a decoder `exact` is read from what it wrote, and `values` is the share of values that stand anywhere in that text:
RULER's own score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_ksa.charts import chart
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.forward import predictions
from megatron_ksa.evaluation.generation import Generate, Tokens, in_batches
from megatron_ksa.evaluation.string_match import all_parts
from megatron_ksa.model.forward import hidden_states
from megatron_ksa.model.gpt import KSAGPTModel


@dataclass(frozen=True)
class Form:
    """One form of the test.

    Attributes:
        haystack: 'noise' (one sentence repeated), 'essay' (text), or 'needle' (needles nobody asks for).
        keys, values: what keys and values are made of: 'words', 'numbers' or 'uuids'.
        needles: keys hidden, at least; asked: how many of them are asked for; values_per_key: values of the asked key.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    needles: int = 1
    asked: int = 1
    values_per_key: int = 1


FORMS = {
    "single_1": Form("noise"),
    "single_2": Form("essay"),
    "single_3": Form("essay", values="uuids"),
    "multikey_1": Form("essay", needles=4),
    "multikey_2": Form("needle"),
    "multikey_3": Form("needle", keys="uuids", values="uuids"),
    "multivalue": Form("essay", values_per_key=4),
    "multiquery": Form("essay", needles=4, asked=4),
}


class Language(Protocol):
    """How needles, haystacks and questions are written in tokens.

    Attributes:
        new_tokens: that a model may write as its answer, where that is longer than the reference.
    """

    new_tokens: int

    def item(self, kind: str, random: np.random.Generator) -> str:
        """A random key or value of the kind 'words', 'numbers' or 'uuids'."""

    def needle(self, key: str, value: str, form: Form) -> Tokens:
        """The sentence that tells the key's value."""

    def sentences(self, haystack: str, tokens: int, random: np.random.Generator) -> list[Tokens]:
        """Sentences of a 'noise' or 'essay' haystack, together at most `tokens` tokens."""

    def opening(self, form: Form) -> Tokens:
        """What stands before the haystack."""

    def question(self, keys: list[str], form: Form) -> Tokens:
        """What stands after the haystack, up to the answer."""

    def answer(self, values: list[str]) -> list[Tokens]:
        """The reference answer, a piece a value; together what a right model goes on with."""

    def decode(self, tokens: Tokens) -> str:
        """What a model wrote, as text."""

    def spelling(self, value: str) -> str:
        """A value as it stands in a decoded text."""


@dataclass(frozen=True)
class Case:
    """One test.

    Attributes:
        answer: the pieces of the reference answer, a piece a value.
        values: what a decoded text has to contain.
        new_tokens: that a model may write; with the prompt they are within the length.
    """

    prompt: Tokens
    answer: list[Tokens]
    values: tuple[str, ...] = ()
    new_tokens: int = 0


def build_case(
    form: Form, language: Language, length: int, depth: float, random: np.random.Generator, *, decoded: bool = False
) -> Case:
    """A case of at most `length` tokens, answer included.

    Args:
        decoded: leave room for all that a model may write, not for the reference answer alone.
        depth: where the first needle that is asked for stands, 0 (start of the haystack) to 1 (end). All other needles
            stand at random places.

    Raises:
        UsageError: a length too short for the needles and the question.
    """
    used: set[str] = set()

    def fresh(kind: str) -> str:
        while (item := language.item(kind, random)) in used:
            pass
        used.add(item)
        return item

    keys = [fresh(form.keys) for _ in range(form.needles)]
    pairs = [(key, fresh(form.values)) for key in keys for _ in range(form.values_per_key if key == keys[0] else 1)]
    needles = [language.needle(key, value, form) for key, value in pairs]
    asked = keys[: form.asked]
    opening, question = language.opening(form), language.question(asked, form)
    longest_answer = language.answer([value for key, value in pairs if key in asked])
    reference = sum(map(len, longest_answer))
    new_tokens = max(reference, language.new_tokens) if decoded else reference
    room = length - new_tokens - sum(map(len, [opening, question, *needles]))
    if room < 0:
        raise UsageError(
            f"{length} tokens are too few for this needle test: {length - room} are needed without a haystack"
        )
    if form.haystack == "needle":
        hay: list[Tokens] = []
        while len(more := language.needle(fresh(form.keys), fresh(form.values), form)) <= room:
            hay.append(more)
            room -= len(more)
    else:
        hay = language.sentences(form.haystack, room, random)
    # Place of each needle among the sentences; those asked for in the order in which they then stand.
    places = random.integers(0, len(hay) + 1, len(needles))
    places[0] = round(depth * len(hay))
    order = np.argsort(places, kind="stable")
    context: Tokens = []
    done = 0
    for index in order:
        context += [token for sentence in hay[done : places[index]] for token in sentence] + needles[index]
        done = places[index]
    context += [token for sentence in hay[done:] for token in sentence]
    if form.asked > 1:
        values = [value for key, value in pairs if key in asked]
    else:
        values = [pairs[index][1] for index in order if pairs[index][0] in asked]
    spelled = tuple(language.spelling(value) for value in values)
    return Case(opening + context + question, language.answer(values), spelled, new_tokens)


@dataclass
class Score:
    """Mean scores of one form, length and depth, 0 to 1."""

    form: str
    length: int
    depth: float
    cases: int
    exact: float
    values: float


def score_cases(model: KSAGPTModel, cases: Sequence[Case]) -> list[tuple[bool, float]]:
    """Whether each case's answer is exactly the reference, and the share of its values that are right.

    The cases run as one batch, padded at the end, where causal attention cannot see.
    """
    answers = [[token for piece in case.answer for token in piece] for case in cases]
    rows = [case.prompt + answer for case, answer in zip(cases, answers, strict=True)]
    batch = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = torch.tensor(row)
    hidden = hidden_states(model, batch)
    scores = []
    for index, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        first = len(case.prompt) - 1
        right = predictions(model, hidden[index, first : first + len(answer)]).cpu() == torch.tensor(answer)
        pieces = [bool(part.all()) for part in right.split([len(piece) for piece in case.answer])]
        scores.append((all(pieces), sum(pieces) / len(pieces)))
    return scores


def decoded(generate: Generate, language: Language, cases: Sequence[Case]) -> list[tuple[bool, float]]:
    """The same from what a decoder writes: whether the reference begins it, and the share of values that it has."""
    scores = []
    written = generate([case.prompt for case in cases], max(case.new_tokens for case in cases))
    for case, tokens in zip(cases, written, strict=True):
        reference = [token for piece in case.answer for token in piece]
        exact = tokens[: len(reference)] == reference
        scores.append((exact, all_parts(language.decode(tokens[: case.new_tokens]), case.values)))
    return scores


def evaluate(
    model: KSAGPTModel | Generate,
    language: Language,
    form: str,
    length: int,
    depth: float,
    *,
    cases: int,
    tokens_per_batch: int,
    seed: int = 0,
) -> Score:
    """Mean score of `cases` random cases, which depend on the arguments and the seed alone.

    Args:
        model: scored with its answers teacher-forced; or a decoder.
    """
    random = np.random.default_rng([seed, sorted(FORMS).index(form), length, round(1000 * depth)])
    forced = isinstance(model, KSAGPTModel)
    built = [build_case(FORMS[form], language, length, depth, random, decoded=not forced) for _ in range(cases)]
    scores: list[tuple[bool, float]] = []
    for batch in in_batches(built, length, tokens_per_batch):
        scores += score_cases(model, batch) if forced else decoded(model, language, batch)
    exact, values = (float(np.mean(column)) for column in zip(*scores, strict=True))
    return Score(form, length, depth, cases, exact, values)


def plot_heat_map(scores: Sequence[Score], path) -> None:
    """Write depth x length heat maps of the share of right values, one a form, as PNG."""
    forms = list(dict.fromkeys(score.form for score in scores))
    lengths, depths = (sorted({getattr(score, name) for score in scores}) for name in ("length", "depth"))
    columns = min(len(forms), 4)
    rows = -(-len(forms) // columns)
    size = (3.4 * columns, 2.6 * rows + 0.4)
    with chart(path, rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained") as (figure, axes):
        for axis, form in zip(axes.flat, forms, strict=False):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for score in scores:
                if score.form == form:
                    grid[depths.index(score.depth), lengths.index(score.length)] = score.values
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_title(f"{form}  {np.nanmean(grid):.0%}", fontsize=10)
            labels = [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths]
            axis.set_xticks(range(len(lengths)), labels, fontsize=8)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        for axis in list(axes.flat)[len(forms) :]:
            axis.axis("off")
        figure.supxlabel("context length (tokens)", fontsize=9)
        figure.supylabel("depth of the needle", fontsize=9)
        figure.colorbar(image, ax=axes, label="values found")
