"""Measurements of several seeds: means with deviations, and which differences are more than the seeds' own.

Everything that is compared was measured with the same seeds, so differences are taken seed by seed: what a seed changes
for all alike cancels. A difference counts where the 95 % interval of its mean by Student's t (seeds - 1 degrees of
freedom) leaves out zero. With three seeds that asks for 2.5 times the deviation of the differences.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


def by_choice(runs: Iterable[dict], choices: Iterable[str], seeds: Sequence[int]) -> dict[str, list[dict]]:
    """The runs of each choice in the order of the seeds; choices that lack a seed are left out.

    Args:
        runs: with `choice` and `seed`.
        choices: their order in the result.
    """
    known = {(run["choice"], run["seed"]): run for run in runs}
    found = {name: [known[name, seed] for seed in seeds if (name, seed) in known] for name in choices}
    return {name: of_seeds for name, of_seeds in found.items() if len(of_seeds) == len(seeds)}


def mean_and_deviation(values: Sequence[float], scale: float = 1.0, digits: int = 3, sign: str = "") -> str:
    """Mean ± standard deviation (of the seeds, n - 1); the mean alone of one value."""
    found = np.asarray(values, np.float64) * scale
    mean = f"{found.mean():{sign}.{digits}f}"
    return f"{mean} ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else mean


def differs(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether first - second, paired by seed, is away from zero by more than the seeds say. Never with one seed."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if len(difference) < 2:
        return False
    half = student.ppf((1 + LEVEL) / 2, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(abs(difference.mean()) > half)


def verdict(measured: Mapping[str, Sequence[float]], higher_is_better: bool, scale: float, digits: int) -> str:
    """The pairs that differ by more than the seeds, the better one first with by how much, and how many do not.

    Args:
        measured: name -> values by seed, the seeds in the same order for all.
        scale: what values are multiplied with.
        digits: after the point.
    """
    clear, pairs = [], list(combinations(measured, 2))
    for first, second in pairs:
        values = np.asarray(measured[first], np.float64), np.asarray(measured[second], np.float64)
        if (values[0].mean() < values[1].mean()) == higher_is_better:
            first, second, values = second, first, values[::-1]
        if differs(*values):
            clear.append(f"{first} before {second} ({mean_and_deviation(values[0] - values[1], scale, digits, '+')})")
    others = f"the other {len(pairs) - len(clear)} of {len(pairs)} pairs do not."
    return f"{'; '.join(clear)}; {others}" if clear else f"none of {len(pairs)} pairs."
