"""The selection beside random ones of the same size and beside another run's, by measures that belong to no sampler."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.selection import SELECTION
from megatron_ksa.errors import UsageError

RANDOM_SELECTIONS = 5


@dataclass(frozen=True)
class Measures:
    """What one selection covers, or the mean of several; scores are NaN where there are none."""

    instances: float
    tag_mass_covered: float
    distinct_tags: float
    effective_tags: float
    effective_branches: float
    quality: float
    difficulty: float
    characters: float


def _effective(mass: np.ndarray) -> float:
    """exp(entropy) of a distribution: how many equally likely values it is worth."""
    share = mass[mass > 0] / (mass.sum() or 1.0)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def measure(pool: Pool, rows: np.ndarray, branch: np.ndarray, length: np.ndarray) -> Measures:
    """Measures of instances, int64 [rows].

    Args:
        branch: int64 [instances], the top branch of each.
        length: int64 [instances], characters.
    """
    whole, chosen = pool.shares.sum(axis=0), pool.shares[rows].sum(axis=0)
    return Measures(
        len(rows), float(whole[chosen > 0].sum() / (whole.sum() or 1.0)), int((chosen > 0).sum()), _effective(chosen),
        _effective(np.bincount(branch[rows][branch[rows] >= 0]).astype(float)), _mean(pool.quality[rows]),
        _mean(pool.difficulty[rows]), _mean(length[rows].astype(float)),
    )  # fmt: skip


def random_measures(pool: Pool, count: int, branch: np.ndarray, length: np.ndarray) -> Measures:
    """Mean of the measures of `RANDOM_SELECTIONS` random selections of as many instances."""
    found = [
        measure(pool, np.random.default_rng(seed).choice(pool.instances, count, replace=False), branch, length)
        for seed in range(RANDOM_SELECTIONS)
    ]
    return Measures(*(float(np.mean([getattr(each, name) for each in found])) for name in vars(found[0])))


def rows_of_other(work: Path, pool: Pool, other: Path) -> tuple[np.ndarray, int]:
    """Rows of this pool that another run chose, int64 [rows], and how many of its choices are not in this pool.

    Raises:
        UsageError: the folder has no selection, or none of its instances is in this pool.
    """
    ids = {row["id"] for row in read_jsonl(other / SELECTION)}
    row_of_line = dict(zip(pool.record.tolist(), range(pool.instances), strict=True)) if ids else {}
    rows = [
        row_of_line[line] for line, record in enumerate(read_jsonl(work / RECORDS))
        if record["id"] in ids and line in row_of_line
    ]  # fmt: skip
    if not rows:
        raise UsageError(f"--compare {other}: none of its {len(ids):,} selected instances is in the pool of {work}")
    return np.array(rows, np.int64), len(ids) - len(rows)
