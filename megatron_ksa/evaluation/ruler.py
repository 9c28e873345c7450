"""RULER's scores of a model: tasks by context length, their average, as a table and a chart."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ksa.charts import chart
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.generation import Generate, in_batches
from megatron_ksa.evaluation.questions import Questions
from megatron_ksa.evaluation.ruler_tasks import TASKS, Sample, TooShortError, question_answering
from megatron_ksa.evaluation.text_language import TextLanguage
from megatron_ksa.markdown import table

QA = "qa"


@dataclass
class Cell:
    """Result of one task at one context length.

    Attributes:
        score: mean over the cases, 0 to 1: the share of answers found, or of questions answered.
        tokens: mean length of the prompts.
        skipped: questions whose own documents are longer than the length.
        texts: what the model wrote, a text a case.
    """

    task: str
    length: int
    cases: int
    score: float
    tokens: float
    skipped: int = 0
    texts: list[str] = field(default_factory=list)


def _questions(
    language: TextLanguage, questions: Questions, length: int, cases: int, random: np.random.Generator
) -> tuple[list[Sample], int]:
    """Cases of `qa`, and how many questions were passed over; a file with fewer questions gives fewer cases."""
    samples: list[Sample] = []
    skipped = 0
    for index in random.permutation(len(questions.questions)):
        if len(samples) == cases:
            break
        try:
            samples.append(question_answering(language, questions, questions.questions[index], length, random))
        except TooShortError:
            skipped += 1
    if not samples:
        raise UsageError(f"--questions: each has documents of more than {length} tokens: give longer --lengths")
    return samples, skipped


def build(
    task: str, language: TextLanguage, length: int, cases: int, seed: int, questions: Questions | None = None
) -> tuple[list[Sample], int]:
    """The cases of a task, which depend on the arguments alone, and the number of questions passed over.

    Raises:
        UsageError: a length too short for the task.
    """
    random = np.random.default_rng([seed, zlib.crc32(task.encode()), length])
    if task == QA and questions is not None:
        return _questions(language, questions, length, cases, random)
    return [TASKS[task](language, length, random) for _ in range(cases)], 0


def evaluate(
    generate: Generate,
    language: TextLanguage,
    task: str,
    length: int,
    *,
    cases: int,
    tokens_per_batch: int,
    seed: int = 0,
    questions: Questions | None = None,
) -> Cell:
    """Score a task at a length.

    Args:
        task: of `TASKS`, or `qa` with `questions`.
        length: tokens of a prompt and of what the model may write after it, at most.
    """
    samples, skipped = build(task, language, length, cases, seed, questions)
    texts: list[str] = []
    for batch in in_batches(samples, length, tokens_per_batch):
        written = generate([sample.prompt for sample in batch], max(sample.new_tokens for sample in batch))
        texts += [language.decode(tokens) for tokens in written]
    scores = [sample.score(text, sample.answers) for sample, text in zip(samples, texts, strict=True)]
    tokens = float(np.mean([len(sample.prompt) for sample in samples]))
    return Cell(task, length, len(samples), float(np.mean(scores)), tokens, skipped, texts)


def averages(cells: Sequence[Cell]) -> dict[int, float]:
    """Mean over the tasks, by length; lengths at which a task is missing are left out."""
    tasks = {cell.task for cell in cells}
    found: dict[int, list[float]] = {}
    for cell in cells:
        found.setdefault(cell.length, []).append(cell.score)
    return {length: float(np.mean(scores)) for length, scores in sorted(found.items()) if len(scores) == len(tasks)}


def short(length: int) -> str:
    """A length as people say it: 4096 is 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length}"


def score_table(cells: Sequence[Cell]) -> str:
    """Per cent, a row a task and one for their average, a column a length, in Markdown."""
    lengths, tasks = sorted({cell.length for cell in cells}), list(dict.fromkeys(cell.task for cell in cells))
    found = {(cell.task, cell.length): cell.score for cell in cells}
    mean = averages(cells)
    rows = [[task, *(_per_cent(found.get((task, length))) for length in lengths)] for task in tasks]
    rows.append([f"average of {len(tasks)}", *(_per_cent(mean.get(length)) for length in lengths)])
    return table(["task", *map(short, lengths)], rows)


def _per_cent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def plot(models: dict[str, Sequence[Cell]], path: Path) -> None:
    """Write averages by length, a line a model, beside the tasks of the first model, as PNG."""
    cells = next(iter(models.values()))
    lengths, tasks = sorted({cell.length for cell in cells}), list(dict.fromkeys(cell.task for cell in cells))
    options = {"figsize": (10.5, 0.3 * len(tasks) + 2.2), "layout": "constrained", "width_ratios": (1, 1.1)}
    with chart(path, columns=2, **options) as (_, (left, right)):
        for name, scored in models.items():
            mean = averages(scored)
            left.plot(mean.keys(), [100 * score for score in mean.values()], marker="o", label=name)
        shown = sorted({length for scored in models.values() for length in averages(scored)})
        left.set_xscale("log", base=2)
        left.set_xticks(shown, [short(length) for length in shown])
        left.minorticks_off()
        left.set(ylim=(-2, 102), xlabel="context length (tokens)", ylabel="RULER average (%)")
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
        grid = np.full((len(tasks), len(lengths)), np.nan)
        for cell in cells:
            grid[tasks.index(cell.task), lengths.index(cell.length)] = 100 * cell.score
        right.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            right.text(column, row, f"{grid[row, column]:.0f}", ha="center", va="center", fontsize=8)
        right.set_xticks(range(len(lengths)), [short(length) for length in lengths])
        right.set_yticks(range(len(tasks)), tasks, fontsize=8)
        right.set(xlabel="context length (tokens)", title=next(iter(models)))
