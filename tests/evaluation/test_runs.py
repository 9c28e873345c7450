"""Results of experiments: measurements that come from several threads at once."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from megatron_ksa.evaluation.runs import Results


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
