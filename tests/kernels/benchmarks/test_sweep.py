"""The sweep of tiles in Triton's interpreter, which candidates are tried, and what goes into the store."""

import json

import pytest
import torch
from benchmark_program import SIZES, TINY, run_program

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks import __main__ as program
from megatron_ksa.kernels.benchmarks import attention_parts, candidates, runner, store
from megatron_ksa.kernels.benchmarks.registry import Shape
from megatron_ksa.kernels.ksa_attention.tile_store import KERNELS, PACKAGE_STORE, Situation, read
from megatron_ksa.kernels.ksa_attention.triton_config import HALF, HOPPER, Tile

FAST, SLOW, WRONG = (16, 16, 4, 1, 0), (16, 32, 4, 1, 0), (32, 16, 4, 1, 0)
H100_SHARED = 227 * 1024

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")


def given(*tiles):
    return dict.fromkeys(KERNELS, [Tile(*tile) for tile in tiles])


@interpreted
def test_sweep_times_right_tiles_and_refuses_wrong_ones(monkeypatch):
    table = attention_parts.sweep(TINY, "cpu", float("inf"), given(FAST, SLOW))
    assert [entry["kernel"] for entry in table] == [kernel for kernel in KERNELS for _ in range(2)]
    assert all(entry["median_ms"] > 0 for entry in table)
    monkeypatch.setattr(attention_parts, "ratio", lambda *rows: 1.0)
    kernels = attention_parts.Kernels(TINY, "cpu")
    assert "median_ms" not in kernels.try_tile("forward", Tile(*FAST), kernels.results["forward"])


@interpreted
def test_sweep_lists_what_it_has_no_time_for():
    table = attention_parts.sweep(TINY, "cpu", 0.0, given(FAST))
    assert [entry["tile"] for entry in table] == [FAST] * 4
    assert all("skipped" in entry and "median_ms" not in entry for entry in table)


@interpreted
def test_sweep_and_store_from_the_command_line(tmp_path, monkeypatch):
    """The winners lie in the file, name what they were measured on, and a record merges to the same."""
    two = [Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)]
    monkeypatch.setattr(candidates, "SINGLE", {64: two})
    monkeypatch.setattr(runner, "check_op", lambda op, device, features: ({}, []))
    times = {FAST: 1.0, SLOW: 2.0}
    measured = attention_parts.Kernels.time_tile

    def timed(self, name, tile):
        assert measured(self, name, tile) > 0
        return times[tile]

    monkeypatch.setattr(attention_parts.Kernels, "time_tile", timed)
    path, out = tmp_path / "tiles.json", tmp_path / "out"
    run_program(
        monkeypatch, "--out", out, *SIZES, "--op", "ksa_parts", "--lengths", 16, "--sweep", 16, 24, "--store", path
    )
    stored = read(path)
    assert {record.kernel for record in stored} == set(KERNELS)
    for record in stored:
        assert record.tile == FAST
        assert record.situation == Situation("cpu", "cpu", 4, 16, True, 4, 3)
        assert record.measured["median_ms"] == {"n16 h2/1": 1.0, "n24 h2/1": 1.0}
        assert record.measured["torch"] == torch.__version__ and record.measured["commit"]
    again = tmp_path / "again.json"
    run_program(monkeypatch, "--merge", out / program.RECORD, "--store", again)
    assert again.read_text() == path.read_text()


def test_a_gpu_that_slows_down_does_not_decide():
    """Candidates timed one after the other won by being early: each was faster while the GPU was cool."""

    class WarmingUp:
        device, calls = "cuda", 0
        true_ms = {FAST: 1.0, SLOW: 1.05}

        def time_tile(self, name, tile):
            self.calls += 1
            return self.true_ms[tile] * 1.06**self.calls

    kernels = WarmingUp()
    entries = [{"kernel": "dq", "tile": tile, "rounds_ms": [kernels.time_tile("dq", tile)]} for tile in (SLOW, FAST)]
    assert entries[0]["rounds_ms"] < entries[1]["rounds_ms"]
    attention_parts._time_in_rounds(kernels, entries, float("inf"))
    slow, fast = entries
    assert fast["median_ms"] < slow["median_ms"] and len(fast["rounds_ms"]) == 1 + len(attention_parts.LATER_ROUNDS)


def test_nothing_is_swept_where_the_check_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "check_op", lambda op, device, features: ({}, [f"{op.name} out"]))
    plan = runner.Plan((), (), "cpu", tmp_path / "record.json", sweep_shapes=(TINY,))
    with pytest.raises(UsageError, match="ksa out"):
        runner.run(plan)
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    "tables, winner",
    [
        ([{FAST: 1.0, SLOW: 2.0}], FAST),
        # Twice the best at a short length costs more than a tenth at a long one.
        ([{FAST: 1.0, SLOW: 2.0}, {FAST: 110.0, SLOW: 100.0}], FAST),
        ([{FAST: 1.1, SLOW: 1.0}, {FAST: 150.0, SLOW: 100.0}], SLOW),
        # The fastest of one length raises or is wrong at another.
        ([{FAST: 1.0, SLOW: 2.0, WRONG: 0.1}, {FAST: 1.0, SLOW: 2.0}], FAST),
        ([{FAST: 1.0}, {SLOW: 1.0}], None),
        ([{FAST: 1.0}, {}], None),
        ([], None),
    ],
)
def test_the_fastest_over_lengths(tables, winner):
    assert store.fastest(tables) == winner


def record_of(*sweeps, **header):
    """A record whose sweeps are (n, entries by tile) of the forward kernel."""
    return {
        "header": {
            "gpu": "NVIDIA H100", "capability": "9.0", "torch": "2", "triton": "3", "commit": "abc", "date": "2026",
            "kernels_changed_since": False,
        } | header,
        "results": [],
        "sweeps": [
            {"shape": Shape(n).as_json(), "tiles": [{"kernel": "forward", "tile": list(t)} | e for t, e in entries]}
            for n, entries in sweeps
        ],
    }  # fmt: skip


def test_a_length_that_was_not_swept_to_its_end_does_not_count():
    whole = [(FAST, {"median_ms": 2.0}), (SLOW, {"median_ms": 3.0}), (WRONG, {"difference": 0.5})]
    cut = [(SLOW, {"median_ms": 1.0}), (FAST, {"skipped": "the run's time was over"})]
    (found,) = store.winners(record_of((1024, whole), (2048, cut)))
    assert found.tile == FAST and found.measured["median_ms"] == {"n1024 h32/32": 2.0}
    assert found.situation == Situation("NVIDIA H100", "9.0", 2, 128, False, 8, 128)
    assert store.winners(record_of((2048, cut))) == []


def test_a_commit_with_changes_says_so():
    (found,) = store.winners(record_of((1024, [(FAST, {"median_ms": 2.0})]), kernels_changed_since=True))
    assert found.measured["commit"] == "abc and changes"


@pytest.mark.parametrize(
    "broken", [{}, {"header": {}}, {"header": None, "sweeps": []}, record_of() | {"sweeps": {"n1": []}}]
)
def test_a_record_without_sweeps_is_refused(broken):
    with pytest.raises(UsageError, match="no record of these benchmarks"):
        store.winners(broken)


def test_wrong_tiles_and_wrong_files_are_one_line_and_leave_the_store(tmp_path, monkeypatch, capsys):
    record, path = tmp_path / "kernels.json", tmp_path / "tiles.json"
    record.write_text(json.dumps(record_of((1024, [((64, 65, 4, 2, 0), {"median_ms": 2.0})]))))
    broken = tmp_path / "broken.json"
    broken.write_text('[{"kernel": "forward"}]')
    package = PACKAGE_STORE.read_text()
    right = tmp_path / "right.json"
    right.write_text(json.dumps(record_of((1024, [(FAST, {"median_ms": 2.0})]), gpu=None)))
    for arguments, message in (
        (["--merge", record, "--store", path], "powers of two"),
        (["--merge", right, "--store", broken], "broken.json, record 1: missing key"),
        (["--merge", right, "--store"], "times of the interpreter"),
        (["--device", "cpu", "--out", tmp_path / "out", "--sweep", 24, "--store", broken], "broken.json, record 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_program(monkeypatch, *arguments)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not path.exists() and not (tmp_path / "out").exists()
    assert broken.read_text() == '[{"kernel": "forward"}]' and PACKAGE_STORE.read_text() == package


@pytest.mark.parametrize(
    "kernel, tile, head_dim, compiled",
    [
        ("forward", (64, 64, 4, 3), 128, 115712),
        ("forward", (128, 128, 8, 3), 128, 230400),
        ("forward", (64, 64, 4, 3, 1), 96, 164496),
        ("forward", (64, 128, 4, 2, 1), 128, 197200),
        ("dq", (64, 64, 4, 2), 128, 99328),
        ("dq", (64, 64, 4, 2, 1), 128, 197344),
        ("dq", (64, 64, 8, 2), 256, 197632),
        ("dkv_text", (64, 64, 4, 2), 128, 99328),
        ("dkv_summary", (64, 128, 8, 3), 128, 165888),
        ("dkv_text", (64, 64, 4, 3, 1), 128, 231520),
        ("dkv_text", (128, 64, 4, 2, 1), 64, 133696),
    ],
)
def test_arithmetic_of_shared_memory(kernel, tile, head_dim, compiled):
    """Against what triton 3.6 compiled for capability 9.0."""
    assert 0 <= compiled - candidates.shared_bytes(kernel, Tile(*tile), head_dim) <= 3 * 1024


def test_every_default_tile_fits_an_h100():
    for table in (HALF, HOPPER):
        for dim, tiles in table.items():
            for kernel, tile in tiles._asdict().items():
                assert candidates.shared_bytes(kernel, tile, dim) <= H100_SHARED
                assert candidates.accumulators(kernel, tile, dim) <= candidates.REGISTERS


def test_statistics_of_a_dkv_tile_fill_128_bytes():
    """Those of 16 queries took 64: the copy engine was sent between, and the sweep of head_dim 256 ended there."""
    for head_dim in (64, 128, 256):
        for tile in candidates.candidates("dkv_text", head_dim, 2, H100_SHARED, True):
            assert tile.queries * 4 % 128 == 0


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit_and_there_is_a_choice(kernel, head_dim, hopper):
    tiles = candidates.candidates(kernel, head_dim, 2, H100_SHARED, hopper)
    assert len(set(tiles)) == len(tiles) >= 5
    assert all(candidates.shared_bytes(kernel, tile, head_dim) <= H100_SHARED for tile in tiles)
    assert all(candidates.accumulators(kernel, tile, head_dim) <= candidates.REGISTERS for tile in tiles)
    assert hopper or not any(tile.specialised for tile in tiles)
    # A GPU with less shared memory gets fewer of them.
    assert set(candidates.candidates(kernel, head_dim, 2, 64 * 1024, hopper)) < set(tiles)
    assert set(candidates.candidates(kernel, head_dim, 4, H100_SHARED, hopper)) == {
        Tile(*numbers) for numbers in candidates.SINGLE[max(64, 1 << (head_dim - 1).bit_length())]
    }
