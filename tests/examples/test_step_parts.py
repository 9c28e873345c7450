"""The script that divides a step into parts: how kernels are told apart, and a run at a size that a CPU trains."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from example_modules import example_modules
from warm import run_script

FOLDER = Path(__file__).parents[2] / "examples" / "throughput_1b9"
sys.path.insert(0, str(FOLDER))
import kernel_parts  # noqa: E402

WORDS = 151936
BF16 = ("c10::BFloat16", "c10::BFloat16")


@pytest.mark.parametrize(
    ("kernel", "operator", "sizes", "types", "part"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NTT", "aten::mm", ((9216, 2048), (2048, 6144)), BF16,
         "products of the layers"),
        ("nvjet_hsh", "aten::addmm", ((WORDS, 2048), (WORDS, 8192), (8192, 2048)), BF16,
         "products of the output layer"),
        ("_forward_kernel", "_Attention", (), (), "attention"),
        ("rotate_backward_kernel", "rotateBackward", (), (), "rotation"),
        ("rms_norm_backward_kernel", "_NormBesideResidualBackward", (), (), "norms"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate", "aten::x", (), (), "norms"),
        ("triton_poi_fused_mul_silu_0", "", (), (), "activation"),
        ("triton_poi_fused_add_0", "", (), (), "residual"),
        ("gradients_kernel", "_ChunkedCrossEntropyBackward", (), (), "loss"),
        ("void at::native::elementwise_kernel<128>", "aten::add_", ((2048,), (2048,)), ("float", "c10::BFloat16"),
         "sums of gradients in float32"),
        ("void at::native::vectorized_elementwise_kernel<4>", "aten::add", ((9, 1, 8),) * 2, BF16, "residual"),
        ("Memset (Device)", "aten::zero_", (), (), "zeros"),
        ("void cub::DeviceRadixSortOnesweepKernel", "aten::embedding_dense_backward", (), (), "embedding"),
        ("ncclDevKernel_AllReduce", "c10d::allreduce_", (), (), "other"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart(kernel, operator, sizes, types, part):
    assert kernel_parts.part_of(kernel, operator, sizes, types, WORDS) == part


def test_a_trace_is_read(tmp_path):
    """Kernels that overlap are busy once; those within the optimizer's range are its."""

    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}

    events = [
        event("cpu_op", "aten::mm", 0, 5, **{"External id": 1, "Input Dims": [[4, 2], [2, 8], []]}),
        event("cpu_op", "aten::add_", 6, 5, **{"External id": 2, "Input type": ["float", "float"]}),
        event("gpu_memset", "Memset (Device)", 99, 1, **{"External id": 1}),
        event("kernel", "nvjet", 100, 40, **{"External id": 1}),
        event("kernel", "vectorized", 130, 30, **{"External id": 2}),
        event("gpu_user_annotation", kernel_parts.OPTIMIZER, 200, 50),
        event("kernel", "adam_kernel", 210, 20),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    parts, busy = kernel_parts.read_trace(path, WORDS, on_gpu=True)
    assert {name: part.ms for name, part in parts.items()} == pytest.approx(
        {"products of the layers": 0.041, "sums of gradients in float32": 0.03, "optimizer": 0.02}
    )
    assert busy == pytest.approx(0.081)
    # One call of the operator, two kernels: counted as two, the floor of products was twice what products took.
    assert parts["products of the layers"].shapes == {("aten::mm", ((4, 2), (2, 8), ())): [1, pytest.approx(0.041)]}
    assert parts["products of the layers"].kernels == 2


def test_products_multiply_what_they_do_not_add_or_write():
    """The last two matrices among an operator's inputs are a factor and the result where it is given."""
    assert kernel_parts.factors("aten::mm", ((4, 2), (2, 8), (), (4, 8))) == ((4, 2), (2, 8))
    assert kernel_parts.factors("aten::addmm", ((4, 8), (4, 2), (2, 8), (), (), (), (4, 8))) == ((4, 2), (2, 8))
    assert kernel_parts.product_flops((4, 2), (2, 8)) == 2 * 4 * 2 * 8
    assert kernel_parts.product_flops((16, 4, 2), (16, 2, 3)) == 2 * 16 * 4 * 2 * 3


@pytest.fixture
def example(monkeypatch):
    """`run` and `step_parts`."""
    others = ("runs", "report", "report_ranks", "layouts")
    yield from example_modules(monkeypatch, FOLDER, "run", "step_parts", others=others)


def timed(length, before, after, **more):
    """A run with the milliseconds of two variants' turns."""
    times = {"before": before, "all": after}
    ms = {name: sum(turns) / len(turns) for name, turns in times.items() if turns}
    run = {"model": "ksa", "length": length, "times_ms": times, "iteration_ms": ms, "peak_gib": dict.fromkeys(ms, 1.0)}
    return run | {"machine": {"gpu": "G", "torch": "2", "triton": "3", "commit": "0123"}} | more


def test_a_run_that_was_cut_off_is_in_the_table_of_times_if_each_variant_had_its_turns(example):
    """Its parts are not known; where a variant had fewer turns, its median is of another time than the others'."""
    _, step_parts = example
    part = {"ms": 5.0, "floor_ms": 3.0, "kernels": 2}
    profile = {"parts": {"attention": part}, "busy_ms": 90.0}
    done = timed(
        32768, [100.0], [95.0], profiles={"before": profile, "all": profile}, copy_bytes_per_ms=4.2e9,
        fastest_flops_per_ms=7e11,
    )  # fmt: skip
    cut = timed(8192, [50.0, 54.0], [40.0, 42.0], error="not done after 57 s", note="Cut off.")
    text = step_parts.tables([done, cut, timed(131072, [9.0], [], error="not done after 57 s")])
    assert text.splitlines()[0] == (
        "One G, torch 2, triton 3, commit 0123. Variants take turns in one process; medians. Cut off."
    )
    rates = "a copy moves 4.20 TB/s, the fastest product computes 700 TFLOP/s:"
    assert f"\nKSA, 32,768 tokens, milliseconds of a step; {rates}\n" in text
    assert "| 8,192 | KSA | all of these | 41.0 | 11.0 | 199,805 |  | 1.0 |" in text
    assert "| attention | 5.00 | 5.00 | 3.00 | 2.00 | 2 |" in text
    assert "131,072" not in text and text.count("milliseconds of a step") == 1
    assert step_parts.tables([cut]) == "Not measured yet."


def test_a_commit_that_is_given_takes_the_place_of_gits_word(example):
    """A record said that its kernels had changed since a commit that git there did not know."""
    name_commit = example[0].name_commit
    result = {"machine": {"commit": "0123", "kernels_changed_since": True}}
    name_commit(result, None)
    assert result["machine"] == {"commit": "0123", "kernels_changed_since": True}
    name_commit(result, "4567")
    assert result["machine"] == {"commit": "4567", "kernels_changed_since": None}
    name_commit({"error": "no record"}, "4567")


@pytest.mark.parametrize("script", ["step_parts", "run"])
def test_a_page_without_the_section_is_found_before_the_run(example, monkeypatch, capsys, tmp_path, script):
    """The script measured for minutes and then said that its table has no place."""
    module = dict(zip(("run", "step_parts"), example, strict=True))[script]
    page, out = tmp_path / "page.md", tmp_path / f"{script}_new.json"
    page.write_text("<!-- step_parts -->\n<!-- /step_parts -->\n")
    monkeypatch.setattr(sys, "argv", [script, "--out", str(out), "--report", str(page)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and "no section between <!-- " in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_the_page_has_the_tables_of_the_committed_files(example, tmp_path, gpu):
    page, written = Path(__file__).parents[2] / "docs" / "results.md", tmp_path / "results.md"
    shutil.copy(page, written)
    example[1].write_report(FOLDER / f"step_parts_{gpu}.json", written)
    assert written.read_text() == page.read_text()


@pytest.mark.slow
def test_variants_and_parts_of_a_small_model(tmp_path):
    out, page = tmp_path / "step_parts_tiny.json", tmp_path / "page.md"
    page.write_text("before\n<!-- step_parts_tiny -->\nold\n<!-- /step_parts_tiny -->\nafter\n")
    flags = "--tiny --lengths 64 --models ksa --measured 1 --variants before all".split()
    done = run_script(FOLDER / "step_parts.py", *flags, "--out", out, "--report", page)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = json.loads(out.read_text())
    assert set(run["iteration_ms"]) == {"before", "all"}
    assert all(len(times) == 2 for times in run["times_ms"].values())
    products = run["profiles"]["all"]["parts"]["products of the layers"]
    assert products["ms"] > 0 and products["floor_ms"] > 0
    # The loss falls through all variants' turns: they train one model.
    assert sum(run["losses"][-3:]) < sum(run["losses"][:3])
    text = page.read_text()
    assert "old" not in text and "| 64 | KSA | all of these |" in text and "| no kernel runs |" in text
