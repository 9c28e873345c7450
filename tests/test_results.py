"""Results of experiments: measurements that come from several threads at once, and of other settings."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.results import Results


def test_reports_are_written_one_at_a_time(tmp_path):
    """Two threads wrote one report at once: one found its temporary file renamed away, and the experiment ended."""
    busy, reports = Lock(), []

    def report() -> None:
        assert busy.acquire(blocking=False), "two reports at once"
        reports.append(len(json.loads((tmp_path / "results.json").read_text())["runs"]))
        busy.release()

    results = Results(tmp_path / "results.json", {"steps": 3}, ("seed",), "0" * 7, report)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: results.add({"seed": seed % 10, "loss": seed}), range(40)))
    assert sorted(reports) == reports and len(reports) == 40
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert sorted(run["seed"] for run in runs) == list(range(10))


def test_results_of_other_settings_are_not_gone_on_with(tmp_path):
    """tags_pays_real took the measurements in its file for its own after the sampler's defaults had changed."""
    path = tmp_path / "results.json"
    Results(path, {"steps": 3, "sizes": (1, 2)}, ("seed",), "0" * 7).add({"seed": 0, "loss": 1.5})
    again = Results(path, {"steps": 3, "sizes": (1, 2)}, ("seed",), "0" * 7)
    assert again.stored() == [{"seed": 0, "loss": 1.5}]
    for settings in ({"steps": 4, "sizes": (1, 2)}, {"steps": 3, "sizes": (1, 2), "power": 0.4}, {"steps": 3}):
        with pytest.raises(UsageError, match="is of other settings"):
            Results(path, settings, ("seed",), "0" * 7).stored()
    path.write_text(json.dumps([{"seed": 0, "loss": 1.5}]))
    with pytest.raises(UsageError, match="does not say of which settings"):
        again.stored()
    assert Results(tmp_path / "none.json", {}, ("seed",), "0" * 7).stored() == []
