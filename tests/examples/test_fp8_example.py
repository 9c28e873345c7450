"""The FP8 example, as far as a machine without FP8 can tell."""

import argparse
import json
from pathlib import Path

import pytest
import warm
from example_modules import example_modules

from megatron_ksa.errors import UsageError

FOLDER = Path(__file__).parents[2] / "examples" / "fp8"
LOG = (
    " [2026-01-01 00:00:00.1] iteration {:8}/     200 | consumed samples:  8 | learning rate: 4.0E-04 | "
    "lm loss: {:.6E} | loss scale: 1.0 | grad norm: {:.3f} |\n"
)


@pytest.fixture
def example(monkeypatch):
    """`run` and `report`."""
    yield from example_modules(monkeypatch, FOLDER, "run", "report", others=("with_noise",))


def test_losses_are_read_from_the_log_and_the_second_is_no_mean(example, monkeypatch, tmp_path):
    """Megatron logs the second step of a run as the mean of both: a resumed run seemed to leave the other one."""
    run, _ = example
    # Losses 5, 4, 3 of steps 4 to 6 of a run that goes on at step 3.
    text = "".join(LOG.format(step, loss, step / 2) for step, loss in ((4, 5.0), (5, 4.5), (6, 3.0)))
    monkeypatch.setattr(run, "MODEL", [])
    monkeypatch.setattr(run, "ROOT", tmp_path)
    options = argparse.Namespace(steps=6, tiny=False, limit=60)
    (tmp_path / "pretrain_gpt.py").write_text(f"print({text!r})")
    assert run.train(tmp_path, "te", [], options) == run.Trained({4: 5.0, 5: 4.0, 6: 3.0}, 2.0)
    (tmp_path / "pretrain_gpt.py").write_text("import sys; sys.exit('error: no GPU here')")
    assert run.train(tmp_path, "te", [], options) == "error: no GPU here"


def test_a_recipe_stands_beside_16_bits(example, tmp_path):
    """A run that could not go on from its checkpoint has losses all the same."""
    _, report = example
    runs = [
        {"kind": "te", "first_norm": 20.819, "losses": [4.0, 2.0], "resumed_deviation": 0.0},
        {"kind": "te_noise_1", "first_norm": 20.5, "losses": [4.0, 2.06]},
        {"kind": "fp8_delayed", "losses": [4.04, 2.0], "error": "resumed: not done after 200 s"},
        {"kind": "fp8_blockwise", "error": "no GPU"},
    ]
    rows = report.deviations(runs)
    assert rows[0][1:3] == ["20.819", "3.0000"] and rows[1][3:] == ["3.00 %", "+1.00 %", ""]
    assert rows[2][2:] == ["3.0200", "1.00 %", "+0.67 %", "resumed: not done after 200 s"] and rows[3][2] == "no GPU"
    assert report.spread(runs).startswith(
        "2 runs in 16 bits that differ by chance: the last mean is +0.00 % to +1.00 %"
    )
    # From the same start: 3.02 / 3 and 3.0906 / 3.03.
    noisy = {"kind": "fp8_delayed_noise_1", "losses": [4.1, 2.0812]}
    assert report.recipes(runs) == [["FP8, delayed", 1, "+0.67 %", ""]]
    assert report.recipes([*runs, noisy]) == [["FP8, delayed", 2, "+1.33 %", "0.67 %"]]
    assert not report.spread([run for run in runs if run["kind"] != "te_noise_1"])
    results, page = tmp_path / "results.json", tmp_path / "README.md"
    results.write_text(json.dumps({"device": "x", "torch": "2", "steps": 2, "lr": "1", "tokens": 5, "runs": runs}))
    page.write_text("<!-- results -->\n<!-- /results -->\n")
    report.write_report(results, page)
    assert "| FP8, delayed |" in page.read_text() and "+1.00 %" in page.read_text()
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_a_second_call_keeps_what_it_does_not_train(example, tmp_path):
    run, _ = example
    record = {"device": "x", "torch": "2", "steps": 2, "tokens": 5}
    path = tmp_path / "results.json"
    assert run.kept_runs(path, record, ["te"]) == {}
    runs = [{"kind": "te", "losses": [1.0]}, {"kind": "local", "losses": [2.0], "error": "resumed: x"}]
    path.write_text(json.dumps({**record, "runs": runs}))
    assert run.kept_runs(path, record, ["te"]) == {"local": runs[1]}
    with pytest.raises(UsageError, match="has local of tokens 5, here it is 6: choose another --out"):
        run.kept_runs(path, {**record, "tokens": 6}, ["te"])
    assert run.kept_runs(path, {**record, "tokens": 6}, ["te", "local"]) == {}


def test_noise_is_as_large_as_the_rounding_of_fp8_and_another_for_each_seed(example):
    import torch
    import with_noise

    def model():
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).bfloat16()

    torch.manual_seed(0)
    whole = model()
    stages = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        (stage,) = with_noise.add_noise([model()], seed)
        stages.append(stage)
    weight, (first, again, other) = whole[0].weight, [stage[0].weight for stage in stages]
    assert torch.equal(first, again) and not torch.equal(first, other)
    change = (first.float() / weight.float() - 1).abs()
    # bf16 rounds the product once more.
    assert 0.05 < change.max() < 2**-4 + 2**-8 and 0.02 < change.mean() < 0.04
    assert torch.equal(stages[0][1].weight, whole[1].weight), "norms are not multiplied in FP8"


@pytest.mark.slow
def test_a_run_with_noise_begins_as_well_as_one_without(example, tmp_path):
    run, _ = example
    run.write_text(tmp_path / "text")
    flags = [*run.MODEL, *run.TINY, *run.LOCAL, "--data-path", str(tmp_path / "text"), "--train-iters", "1",
             "--lr-decay-iters", "2"]  # fmt: skip
    lines = []
    for script in ([run.ROOT / "pretrain_gpt.py"], [FOLDER / "with_noise.py", "1"]):
        done = warm.run_script(*script, *flags)
        lines += run.LINE.findall(done.stdout) or [done.stderr[-3000:]]
    (_, loss, norm), (_, noisy, noisy_norm) = lines
    assert noisy != loss and float(noisy) == pytest.approx(float(loss), rel=0.01)
    assert float(noisy_norm) == pytest.approx(float(norm), rel=0.1)
