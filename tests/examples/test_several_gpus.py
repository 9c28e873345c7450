"""The throughput script on several GPUs: layouts by name, exposed communication, the report; two ranks on a CPU."""

import json
import sys
from pathlib import Path

import pytest
from warm import run_with_forks

FOLDER = Path(__file__).parents[2] / "examples" / "throughput_1b9"
sys.path.append(str(FOLDER))
from communication import exposure, merged, overlap  # noqa: E402
from layouts import parse_layout  # noqa: E402
from report_ranks import by_arithmetic, name_of, tables  # noqa: E402

from megatron_ksa.errors import UsageError  # noqa: E402


def test_layouts_by_name():
    layout = parse_layout("tp2-cp4-a2a")
    assert (layout.tensor, layout.context, layout.comm, layout.gpus) == (2, 4, "a2a", 8)
    assert "--sequence-parallel" in layout.flags and layout.flags[-1] == "a2a"
    assert parse_layout("one").flags == [] and parse_layout("one").gpus == 1
    assert name_of({"layout": "tp2-cp4-a2a"}) == "TP 2 x CP 4, all-to-all"
    layout = parse_layout("cp2-a2a-fit")
    assert (layout.comm, layout.fit, layout.gpus) == ("a2a", True, 2)
    assert parse_layout("one-fit").flags == ["--recompute-to-fit", "--recompute-to-fit-gpu", "79.18"]
    assert name_of({"layout": "cp2-a2a-fit"}) == "CP 2, all-to-all, recompute to fit"
    assert name_of({"layout": "one-fit", "kind": "te"}) == "one GPU, recompute to fit, te"


OTHERS = (
    "", "cp", "cp0", "cp2-cp4", "tp2-a2a", "dp2", "cp2-", "cp2-one-pass", "cp2-a2a-a2a", "fit", "cp2-fit-fit",
    "one-a2a",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_name_is_one_line(name):
    with pytest.raises(UsageError, match="--layouts"):
        parse_layout(name)


def test_spans_are_merged_and_compared():
    assert merged([(4, 5), (0, 2), (1, 3), (5, 6)]) == [(0, 3), (4, 6)]
    assert overlap([(0, 3), (4, 6)], [(2, 5), (5.5, 9)]) == 2.5
    assert overlap([], [(0, 1)]) == 0


def test_communication_is_exposed_where_nothing_else_runs():
    """Two collectives of 2 and 3 ms, of which computation covers 1.5; half a millisecond in which nothing runs."""
    kernels = [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 2000),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 3000, 6000),
        ("nvjet_tst_128x256", 500, 2500), ("void at::native::add", 400, 600),
    ]  # fmt: skip
    found = exposure(kernels)
    assert found["communication"] == 5 and found["exposed"] == pytest.approx(3.4)
    assert found["hidden"] == pytest.approx(1.6 / 5)
    assert found["idle"] == 0.5 and found["computation"] == pytest.approx(2.1)
    assert found["ms of SendRecv"] == 2 and found["ms of AllGather_RING_LL"] == 3
    assert exposure([("gemm", 0, 1)])["hidden"] == 1.0


def run(**changes) -> dict:
    """A result as the script writes it."""
    profile = {"communication": 100.0, "exposed": 20.0, "hidden": 0.8, "idle": 3.0,
               "sent_gb": {"context": 2.0, "tensor": 0.0, "data": 1.0}, "nvlink_gb": 3.1}  # fmt: skip
    predicted = {"memory_gib": 30.0, "seconds": 1.6, "sent_gb": {"context": 2.0, "tensor": 0.0, "data": 1.0}}
    machine = {"gpu": "H100", "torch": "2", "triton": "3", "commit": "0123456789"}
    return {
        "model": "ksa", "length": 1000, "layout": "cp4", "gpus": 4, "shape": "1b9", "complete": True, "mfu": 0.4,
        "tokens_per_second": 500.0, "iteration_ms": 2000.0, "peak_gib": 40.0, "ranks": [{"profile": profile}],
        "parts_ms": {"attention forward": 300.0, "attention backward": 500.0}, "predicted": predicted,
        "machine": machine,
    } | changes  # fmt: skip


def test_report_compares_with_one_gpu_full_attention_and_the_plan():
    full = run(model="full", tokens_per_second=250.0, iteration_ms=4000.0)
    one = run(layout="one", gpus=1, tokens_per_second=140.0)
    text = tables([run(), full, one, {**run(layout="cp4-a2a"), "complete": False, "error": "no end"}])
    assert "| 1.9B | 1,000 | CP 4 | KSA | 500 | 3.57 | 2.00 | 40.0 % | 40.0 | -25 % | 2.00 | -20 % |" in text
    assert "| CP 4 | KSA | 100 | 20 | 3 | 80 % | 2.00 / 2.00 | 0.00 / 0.00 | 1.00 / 1.00 | 3.10 |" in text
    assert "Not measured: 1.9B, 1,000 tokens, CP 4, all-to-all, KSA: no end" in text


def test_full_attention_of_longer_sequences_is_arithmetic():
    """At 8 times the length: attention of 0.8 s takes 64 times as long, the other 3.2 s take 8 times."""
    full = run(model="full", iteration_ms=4000.0)
    (line,) = by_arithmetic([run(), full, run(length=8000, iteration_ms=20000.0)])
    assert "77 s a step, 3.8 times KSA's 20.0 s" in line


@pytest.mark.slow
def test_two_ranks_send_what_the_formula_says(tmp_path):
    out, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("<!-- throughput_1b9_ranks -->\n<!-- /throughput_1b9_ranks -->\n")
    flags = "--tiny --layouts cp2 --models ksa --lengths 64 --iterations 1".split()
    done = run_with_forks(FOLDER / "run.py", *flags, "--out", out, "--report", page)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(out.read_text())
    sent = [rank["profile"]["sent_gb"] for rank in result["ranks"]]
    predicted = result["predicted"]["sent_gb"]
    assert max(rank["context"] for rank in sent) == pytest.approx(predicted["context"])
    # Beside gradients and parameters go the loss, norms and the number of tokens.
    assert all(predicted["data"] <= rank["data"] <= 1.02 * predicted["data"] for rank in sent)
    assert len(result["iterations"]) == 3 and result["complete"] and list(tmp_path.glob("*.part")) == []
    assert "| 1.9B | 64 | CP 2 | KSA |" in page.read_text()
