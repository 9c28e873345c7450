"""What the script on the cost of a checkpoint's sums makes of its times."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "checkpoint_sums"


def test_differences_are_taken_within_a_round():
    """A machine that gets slower from round to round is no cost of sums."""
    summary = runpy.run_path(str(FOLDER / "measure.py"))["summary"]
    more = {"plain": 0.0, "sizes": 0.01, "sums": 0.2}
    times = [
        {"what": "save", "round": turn, "way": way, "seconds": 10 * (turn + 1) + extra, "processor_seconds": 5 + extra,
         "user_seconds": 4}
        for turn in range(3) for way, extra in more.items()
    ]  # fmt: skip
    found = summary([*times, {"what": "load", "round": 0, "way": "plain"}], "save")
    assert found["rounds"] == 3 and found["plain_seconds"] == 20 and found["sums_more_seconds"] == 0.2
    assert found["sums_more_seconds_percent"] == 1.0 and found["sums_more_processor_seconds_percent"] == 4.0
    assert found["sizes_more_seconds"] == 0.01 and len(found["sums_seconds_all"]) == 3


def test_each_way_is_first_equally_often():
    orders = runpy.run_path(str(FOLDER / "measured_pretrain.py"))["_orders"](6)
    assert sorted(ways[0] for _, ways in orders) == ["plain", "plain", "sizes", "sizes", "sums", "sums"]
