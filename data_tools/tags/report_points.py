"""Columns of the report's instances: their place on the map, what became of them, their tags and ids."""

import base64

import numpy as np

from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.report_map import Map

MOST_POINTS, MOST_TARGET = 200_000, 20_000
CHOSEN, OTHER = 1, 2
# A score is stored as a byte: 25 times itself, 0 for none.
SCORE_STEPS = 25


def packed(values: np.ndarray) -> str:
    """Numbers as base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"))).tobytes()).decode()


def point_rows(instances: int, chosen: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """int64 [points], rising: every row, or all that are chosen, up to half of them, and random others."""
    if instances <= most:
        return np.arange(instances)
    generator = np.random.default_rng(0)
    kept = chosen if len(chosen) <= most // 2 else generator.choice(chosen, most // 2, replace=False)
    left = np.setdiff1d(np.arange(instances), chosen, assume_unique=True)
    return np.sort(np.concatenate([kept, generator.choice(left, min(len(left), most - len(kept)), replace=False)]))


def point_columns(
    pool: Pool, rows: np.ndarray, chosen: np.ndarray, other: np.ndarray | None, branch: np.ndarray, place: np.ndarray,
    target: Pool | None,
) -> dict:  # fmt: skip
    """Columns of the page's points, but ids and sources, which are in the records.

    Args:
        pool, target: with `leaf_vectors`.
        rows: int64 [points].
        chosen, other: int64, rows that this and another run chose.
        branch: int64 [instances], the top branch of each, -1 for none.
        place: int64 [nodes], places of nodes in the page.
    """
    state = np.zeros(pool.instances, np.uint8)
    state[chosen] |= CHOSEN
    if other is not None:
        state[other] |= OTHER
    drawn = Map(pool)
    some = pool.take(rows)
    quality = np.nan_to_num(np.round(pool.quality[rows] * SCORE_STEPS), nan=0.0)
    columns = {
        "at": packed(drawn.place(pool, rows)),
        "state": packed(state[rows]),
        "quality": packed(quality.astype(np.uint8)),
        "branch": packed(np.where(branch[rows] < 0, -1, place[branch[rows]]).astype(np.int32)),
        "bounds": packed(some.indptr.astype(np.uint32)),
        "leaves": packed(place[some.leaves].astype(np.uint32)),
        "total": pool.instances,
        "target": "",
    }
    if target is not None:
        generator = np.random.default_rng(0)
        taken = np.arange(target.instances)
        if len(taken) > MOST_TARGET:
            taken = np.sort(generator.choice(taken, MOST_TARGET, replace=False))
        columns["target"] = packed(drawn.place(target, taken))
        columns["target_total"] = target.instances
    return columns
