"""RULER's scores of a text against reference answers (Hsieh et al. 2024, arXiv 2404.06654): substrings, in any case."""

from collections.abc import Sequence


def all_parts(text: str, answers: Sequence[str]) -> float:
    """The share of answers that stand in the text: needles, variables, words."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def any_part(text: str, answers: Sequence[str]) -> float:
    """1 where one of the answers stands in the text, else 0: questions with several accepted answers."""
    return float(any(answer.lower() in text.lower() for answer in answers))
