"""The benchmark runner end to end at tiny sizes, in Triton's interpreter."""

import dataclasses
import json

import pytest
import torch
from benchmark_program import SIZES, TINY, run_program

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks import __main__ as program
from megatron_ksa.kernels.benchmarks import attention, baselines, chart, runner
from megatron_ksa.kernels.benchmarks.measure import _summary
from megatron_ksa.kernels.benchmarks.registry import BOTH, FORWARD, Case, Op

# The chart draws the first two, and the check of `ksa` stands for the third: in the interpreter it takes many seconds.
TWICE = ("ksa", "full_attention", "ksa_parts")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Folder of a record of the ops in TWICE at two lengths, and this record with the other ops at one."""
    out = tmp_path_factory.mktemp("benchmarks")
    others = [op for op in runner.OPS if op not in TWICE]
    with pytest.MonkeyPatch.context() as patch:
        run_program(patch, "--out", out / "others", *SIZES, "--lengths", 24, "--op", *others)
        run_program(patch, "--out", out, *SIZES, "--lengths", 24, 40, "--op", *TWICE)
    first, second = (json.loads((folder / program.RECORD).read_text()) for folder in (out / "others", out))
    checks, results = second["checks"] | first["checks"], second["results"] + first["results"]
    return out, second | {"checks": checks, "results": results}


@pytest.mark.slow
@interpreted
def test_every_op_is_checked_and_timed(record):
    out, written = record
    assert {"gpu", "driver", "torch", "triton", "commit"} <= set(written["header"])
    optional = {op.name for op in baselines.BASELINES}
    assert set(written["checks"]) == set(runner.OPS) - {"ksa_parts"} - optional
    assert [(result["op"], result["shape"]["n"]) for result in written["results"]] == [
        *((op, n) for op in runner.OPS if op in TWICE for n in (24, 40)),
        *((op, 24) for op in runner.OPS if op not in TWICE),
    ]
    for result in written["results"]:
        assert "error" not in result and ("skipped" in result) == (result["op"] in optional)
    for result in [result for result in written["results"] if result["op"] not in optional]:
        for times in result["modes"].values():
            assert 0 < times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
    assert {BOTH, FORWARD} == set(written["results"][0]["modes"])
    assert (out / program.CHART).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@interpreted
def test_chart_is_drawn_from_a_record_alone(record, tmp_path, monkeypatch):
    out, written = record
    run_program(monkeypatch, "--out", tmp_path, "--draw", out / program.RECORD)
    assert [path.name for path in tmp_path.iterdir()] == [program.CHART]
    medians = [times["median_ms"] for _, times in chart.points(written, "ksa", BOTH, (2, 1))]
    assert medians == [result["modes"][BOTH]["median_ms"] for result in written["results"] if result["op"] == "ksa"]


def copying(wrong: bool) -> Op:
    """An op that copies, rightly or with an error of 1 %."""

    def prepare(shape, device):
        leaf = shape.random(shape.n, 1, device)
        return Case([leaf], lambda x: (x * (1.02 if wrong else 1.0),), lambda x: (x + 0,), ("out", "gradient"))

    return Op("copying", "", prepare, lambda device: [TINY])


def plan(tmp_path, *ops, **options):
    return runner.Plan(ops, (TINY,), "cpu", tmp_path / "record.json", **options)


def test_op_whose_check_fails_is_not_timed(tmp_path, monkeypatch):
    right = dataclasses.replace(copying(False), name="right")
    monkeypatch.setattr(runner, "OPS", {"copying": copying(True), "right": right})
    with pytest.raises(UsageError, match="copying .* out"):
        runner.run(plan(tmp_path, "copying", "right"))
    wrong, right = json.loads((tmp_path / "record.json").read_text())["results"]
    assert "modes" not in wrong and wrong["error"] == "not timed: its check fails"
    assert right["modes"]


def test_a_shape_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    def prepare(shape, device):
        if shape.n == 41:
            raise torch.OutOfMemoryError("too large\nfor this GPU")
        return copying(False).prepare(shape, device)

    monkeypatch.setattr(runner, "OPS", {"copying": dataclasses.replace(copying(False), prepare=prepare)})
    shapes = (dataclasses.replace(TINY, n=41), TINY)
    failed, timed = runner.run(dataclasses.replace(plan(tmp_path, "copying"), shapes=shapes))["results"]
    assert failed["error"] == "OutOfMemoryError: too large" and timed["modes"]


def test_nothing_starts_after_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "OPS", {"copying": copying(False)})
    (result,) = runner.run(plan(tmp_path, "copying", limit=-1.0))["results"]
    assert "skipped" in result and "modes" not in result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("summary_tokens", [1, 2])
def test_mask_is_that_of_the_visible_pairs(interleaved, summary_tokens):
    shape = dataclasses.replace(TINY, n=43, summary_tokens=summary_tokens)
    rows = torch.arange(shape.rows)
    visible = attention.mask(shape, interleaved)(None, None, rows[:, None], rows[None, :])
    order = attention.natural_order(shape, "cpu")
    is_text = order < shape.n if interleaved else rows < shape.n
    assert int(visible[is_text].sum()) == attention.visible_pairs(shape)
    own = visible[~is_text].sum(1)
    assert set(own.tolist()) == set(range(shape.chunk_size + 1, shape.chunk_size + summary_tokens + 1))


def test_percentiles():
    times = _summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert times == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "runs": 6}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu"], "--out is missing"),
        (["--device", "cpu", "--out", "{}", "--op", "kas"], "unknown op kas"),
        (["--draw", "{}/absent.json", "--out", "{}"], "absent.json"),
        (["--device", "cpu", "--out", "{}", "--window-chunks", "-1"], "--window-chunks -1"),
        (["--device", "cpu", "--out", "{}", "--heads", "32/5"], "multiple of K/V heads"),
        (["--device", "cpu", "--out", "{}", "--store", "{}/tiles.json"], "give its lengths with --sweep"),
        (["--device", "cpu", "--out", "{}", "--sweep", "24", "--store"], "give a FILE"),
        (["--merge", "{}/absent.json", "--store", "{}/tiles.json"], "--merge {}/absent.json"),
        (["--merge", "{}/absent.json"], "give --store too"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        run_program(monkeypatch, *(argument.format(tmp_path) for argument in arguments))
    assert stop.value.code == 2
    assert message.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
