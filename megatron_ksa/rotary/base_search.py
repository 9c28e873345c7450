"""Choose the RoPE bases of HARPE by their attention waveforms (HARPE, arXiv 2412.07171, Algorithm 1).

The waveform of base b over relative distances m (arXiv 2312.04455): f_b(m) = 2 / sqrt(d) * sum_j cos(m * b^(-2j/d)).
One base attends badly where its waveform has a valley, so the search gives the heads bases whose peaks lie in the
valleys of the others.

The paper does not say which extrema count. Here they are the `num_extrema` local extrema of each kind with the largest
topographic prominence within the target length: as many for each base, so that sums of distances compare.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ksa.errors import UsageError

# Each costs a waveform of the target length.
MAX_CANDIDATES = 100_000


@dataclass(frozen=True)
class Extrema:
    """Positions of the peaks and valleys that count, each int64 [bases, num_extrema], ascending in a row."""

    peaks: np.ndarray
    valleys: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """How well the best head of a set attends over all positions: mean and minimum of max_h f_h(m)."""

    mean: float
    minimum: float


def waveform(base: float, head_dim: int, length: int) -> np.ndarray:
    """f_b(m) for m = 0 .. length - 1: float64 [length].

    With m = B * block + k, cos(m t) = cos(B * block * t) cos(k t) - sin(B * block * t) sin(k t): two matrix products
    instead of length * head_dim / 2 cosines.
    """
    frequencies = float(base) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    block = int(np.ceil(np.sqrt(length)))
    starts = np.arange(0, length, block)[:, None] * frequencies  # [blocks, d / 2]
    within = np.arange(block)[:, None] * frequencies  # [block, d / 2]
    total = np.cos(starts) @ np.cos(within).T - np.sin(starts) @ np.sin(within).T
    return total.ravel()[:length] * 2 / np.sqrt(head_dim)


def _most_prominent(signal: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` most prominent local maxima, ascending; the earlier one where two are equal."""
    from scipy.signal import find_peaks

    positions, properties = find_peaks(signal, prominence=0)
    if len(positions) < count:
        raise UsageError(
            f"--extrema {count}: a waveform has {len(positions)} within --length {len(signal)}; ask for fewer"
        )
    order = np.argsort(-properties["prominences"], kind="stable")[:count]
    return np.sort(positions[order])


def extrema(bases: np.ndarray, head_dim: int, length: int, num_extrema: int) -> Extrema:
    """The extrema of each base that count.

    Raises:
        UsageError: a waveform with fewer of them.
    """
    pairs = []
    for base in bases:
        wave = waveform(base, head_dim, length)
        pairs.append((_most_prominent(wave, num_extrema), _most_prominent(-wave, num_extrema)))
    peaks, valleys = (np.stack(rows) for rows in zip(*pairs, strict=True))
    return Extrema(peaks, valleys)


def candidates(base_min: float, base_max: float, stride: float) -> np.ndarray:
    """base_min, base_min + stride, ... up to base_max: float64 [candidates].

    Raises:
        UsageError: bounds or a stride that leave no candidate.
    """
    if not (0 < base_min <= base_max and stride > 0 and np.isfinite([base_min, base_max, stride]).all()):
        raise UsageError(
            f"--base-min {base_min:g}, --base-max {base_max:g} and --stride {stride:g} must be positive, min below max"
        )
    count = int((base_max - base_min) / stride + 1e-9) + 1
    if count > MAX_CANDIDATES:
        raise UsageError(f"--stride {stride:g} gives {count:,} candidates, at most {MAX_CANDIDATES:,} are searched")
    return base_min + stride * np.arange(count)


def choose_peak_valley(found: Extrema, count: int) -> list[int]:
    """Indices of `count` candidates, in the order chosen: Algorithm 1, greedy from the first candidate.

    Each step adds the candidate with the smallest sum of distances from its peaks to the nearest chosen valley and
    from its valleys to the nearest chosen peak; the lowest base where two are equal.

    Raises:
        UsageError: fewer candidates than heads.
    """
    if len(found.peaks) < count:
        raise UsageError(
            f"{len(found.peaks)} candidates for {count} bases: a smaller --stride or a wider range gives more"
        )

    def to_nearest(positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Distance of each position [candidates, k] to the nearest of the sorted targets [k]."""
        right = np.searchsorted(targets, positions).clip(1, len(targets) - 1)
        return np.minimum(np.abs(positions - targets[right - 1]), np.abs(positions - targets[right]))

    chosen = [0]
    peak_distance = to_nearest(found.peaks, found.valleys[0])
    valley_distance = to_nearest(found.valleys, found.peaks[0])
    while len(chosen) < count:
        scores = peak_distance.sum(1) + valley_distance.sum(1)
        scores[chosen] = np.iinfo(np.int64).max
        chosen.append(int(scores.argmin()))
        peak_distance = np.minimum(peak_distance, to_nearest(found.peaks, found.valleys[chosen[-1]]))
        valley_distance = np.minimum(valley_distance, to_nearest(found.valleys, found.peaks[chosen[-1]]))
    return chosen


def best_head(bases: tuple[float, ...], head_dim: int, length: int) -> np.ndarray:
    """Height of the best head's waveform at every position: float64 [length]."""
    best = np.full(length, -np.inf)
    for base in bases:
        np.maximum(best, waveform(base, head_dim, length), out=best)
    return best


def coverage(best: np.ndarray) -> Coverage:
    """Coverage from the best head's heights [length]."""
    return Coverage(mean=float(best.mean()), minimum=float(best.min()))
