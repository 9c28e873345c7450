"""The FP8 example, as far as a machine without FP8 can tell."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "fp8"
LOG = (
    " [2026-01-01 00:00:00.1] iteration {:8}/     200 | consumed samples:  8 | learning rate: 4.0E-04 | "
    "lm loss: {:.6E} | loss scale: 1.0 |\n"
)


@pytest.fixture
def example(monkeypatch):
    """Modules of the example, forgotten afterwards: other examples have modules of the same names."""
    names = ("run", "report")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    import report
    import run

    yield run, report
    for name in names:
        sys.modules.pop(name, None)


def test_losses_are_read_from_the_log_and_the_second_is_no_mean(example, monkeypatch, tmp_path):
    """Megatron logs the second step of a run as the mean of both: a resumed run seemed to leave the other one."""
    run, _ = example
    # Losses 5, 4, 3 of steps 4 to 6 of a run that goes on at step 3.
    text = "".join(LOG.format(step, loss) for step, loss in ((4, 5.0), (5, 4.5), (6, 3.0)))
    monkeypatch.setattr(run, "MODEL", [])
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "pretrain_gpt.py").write_text(f"print({text!r})")
    assert run.train(tmp_path, [], 6, tiny=False, limit=60) == {4: 5.0, 5: 4.0, 6: 3.0}
    (tmp_path / "pretrain_gpt.py").write_text("import sys; sys.exit('error: no GPU here')")
    assert run.train(tmp_path, [], 6, tiny=False, limit=60) == "error: no GPU here"


def test_a_recipe_stands_beside_16_bits(example, tmp_path):
    _, report = example
    runs = [
        {"kind": "te", "losses": [4.0, 2.0], "resumed_deviation": 0.0},
        {"kind": "fp8_delayed", "losses": [4.04, 2.0], "resumed_deviation": 1e-7},
        {"kind": "fp8_blockwise", "error": "no GPU"},
    ]
    rows = report.deviations(runs)
    assert rows[1][2:] == ["1.00 %", "+0.67 %", "1.0e-07"] and rows[2][1] == "no GPU"
    results, page = tmp_path / "results.json", tmp_path / "README.md"
    results.write_text(json.dumps({"device": "x", "torch": "2", "steps": 2, "tokens": 5, "runs": runs}))
    page.write_text("<!-- results -->\n<!-- /results -->\n")
    report.write_report(results, page)
    assert "| FP8, delayed |" in page.read_text() and (tmp_path / "losses.png").stat().st_size > 1000
