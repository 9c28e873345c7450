"""The search of HARPE bases: waveform, extrema, Algorithm 1, and the tool around them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ksa.config.harpe import PRESETS, HarpeConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.rotary.base_search import (
    Extrema,
    best_head,
    candidates,
    choose_peak_valley,
    coverage,
    extrema,
    waveform,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("length", [1, 100, 4096, 5000])
def test_waveform_is_the_sum_of_cosines(length):
    positions, exponents = np.arange(length), -np.arange(0, 64, 2) / 64
    expected = 2 / 8 * np.cos(positions[:, None] * 5e5**exponents).sum(1)
    np.testing.assert_allclose(waveform(5e5, 64, length), expected, atol=1e-10)


def test_extrema_are_the_most_prominent_and_alternate_in_kind():
    found = extrema(np.array([1e4, 2e4]), 64, 4096, 8)
    for base, peaks, valleys in zip((1e4, 2e4), found.peaks, found.valleys, strict=True):
        wave = waveform(base, 64, 4096)
        assert (wave[peaks] > wave[peaks - 1]).all() and (wave[peaks] > wave[peaks + 1]).all()
        assert (wave[valleys] < wave[valleys - 1]).all() and (wave[valleys] < wave[valleys + 1]).all()
        assert wave[peaks].mean() - wave[valleys].mean() > 2 * wave.std()
    with pytest.raises(UsageError, match="--extrema 4000"):
        extrema(np.array([1e4]), 64, 4096, 4000)


def test_greedy_equals_algorithm_1_by_brute_force():
    random = np.random.default_rng(0)
    for _ in range(50):
        found = Extrema(*(np.sort(random.choice(500, (12, 5))) for _ in range(2)))
        chosen = [0]
        while len(chosen) < 6:
            valleys, peaks = found.valleys[chosen].ravel(), found.peaks[chosen].ravel()
            scores = {
                c: sum(min(abs(p - v) for v in valleys) for p in found.peaks[c])
                + sum(min(abs(v - p) for p in peaks) for v in found.valleys[c])
                for c in range(12) if c not in chosen
            }  # fmt: skip
            chosen.append(min(scores, key=scores.get))
        assert choose_peak_valley(found, 6) == chosen


def test_a_candidate_with_peaks_in_the_valleys_wins():
    found = Extrema(peaks=np.array([[10, 30], [11, 31], [20, 40]]), valleys=np.array([[20, 40], [21, 41], [10, 30]]))
    assert choose_peak_valley(found, 2) == [0, 2]


def test_several_bases_cover_more_than_one():
    one, many = (coverage(best_head(bases, 128, 32768)) for bases in ((5e6,), HarpeConfig().resolve(8)))
    assert many.mean > one.mean and many.minimum > one.minimum


@pytest.mark.parametrize(("low", "high", "stride"), [(0, 1, 1), (2, 1, 1), (1, 2, 0), (1, 2, np.nan), (1, np.inf, 1)])
def test_bounds_that_leave_no_candidate_are_refused(low, high, stride):
    with pytest.raises(UsageError, match="--base-min"):
        candidates(low, high, stride)


def test_paper_range_has_its_candidates():
    values = candidates(1e6, 5e6, 3e4)
    assert len(values) == 134 and values[0] == 1e6 and values[-1] == 4.99e6
    assert set(PRESETS["llama2-7b-128k"]) <= set(values)


def test_tool_is_deterministic_and_training_takes_its_file(tmp_path, monkeypatch):
    tool = str(ROOT / "tools/search_harpe_bases.py")
    flags = ["--groups", "4", "--head-dim", "64"]
    flags += ["--base-min", "1e4", "--base-max", "1e5", "--stride", "5e3", "--length", "4096", "--extrema", "8"]
    flags += ["--order", "descending", "--output"]
    subprocess.run([sys.executable, tool, *flags, str(tmp_path / "a.json")], check=True)
    monkeypatch.setattr(sys, "argv", [tool, *flags, str(tmp_path / "b.json")])
    runpy.run_path(tool, run_name="__main__")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    result = json.loads((tmp_path / "a.json").read_text())
    bases = HarpeConfig(bases=str(tmp_path / "a.json")).resolve(4)
    assert bases == tuple(result["bases"]) == tuple(sorted(bases, reverse=True))
    assert set(result["coverage"]) == {"peak-valley", "uniform", "single base 100000"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
