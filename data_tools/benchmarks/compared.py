"""Measurements of several seeds: means with deviations, and which differences are more than the seeds' own.

Everything that is compared was measured with the same seeds, so differences are taken seed by seed: what a seed changes
for all alike cancels. A difference counts where the 95 % interval of its mean by Student's t (seeds - 1 degrees of
freedom) leaves out zero. With three seeds that asks for 2.5 times the deviation of the differences.
"""

import argparse
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


def seed_number(text: str) -> int:
    """A seed of a command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


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


def differs(difference: Sequence[float]) -> bool:
    """Whether differences by seed are away from zero by more than the seeds say. Never with one seed."""
    found = np.asarray(difference, np.float64)
    if len(found) < 2:
        return False
    half = student.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return bool(abs(found.mean()) > half)


def difference(measured: Sequence[float], reference: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean ± standard deviation of measured - reference, by seed; in bold where it is more than the seeds say."""
    found = [here - there for here, there in zip(measured, reference, strict=True)]
    text = mean_and_deviation(found, scale, digits, "+")
    return f"**{text}**" if differs(found) else text
