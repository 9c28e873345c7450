"""The table of a record: every column, what was skipped, and the committed table."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks import report
from megatron_ksa.kernels.benchmarks.registry import BOTH, FORWARD, Shape

ROOT = Path(__file__).parents[3]
HEADER = {"gpu": "G", "torch": "2.1", "triton": "3.2", "cudnn": 91900, "commit": "0123456789ab"}
PACKAGE = "flash_attn is not installed"


def result(op, n, heads, forward=None, both=None, pairs=None, **more):
    timed = {}
    if forward is not None:
        modes = {FORWARD: {"median_ms": forward}, BOTH: {"median_ms": both}}
        timed = {"visible_pairs": pairs, "modes": modes}
    return {"op": op, "shape": Shape(n, *heads).as_json()} | timed | more


RECORD = {
    "header": HEADER,
    "checks": {
        "ksa": {"n9": {"out": 0.001, "repeat": 0.0}},
        "nsa": {"n9": {"out": 0.001, "repeat": 0.0}, "n10": {"repeat": float("inf")}},
        "moba": {"n9": {"error": "not there"}},
    },
    "results": [
        result("ksa", 8192, (32, 2), 0.5, 2.0, 11_000_000),
        result("ksa", 32768, (32, 2), 4.0, 160.04, 96_000_000),
        result("full_attention", 8192, (32, 2), 1.25, 5.0, 33_000_000, backend="cudnn"),
        result("full_attention", 32768, (32, 2), error="out of memory", modes={FORWARD: {"median_ms": 9.0}}),
        result("nsa", 8192, (32, 2), 1.0, 3.0, 8_000_000, window_tokens=0),
        result("nsa", 32768, (32, 2), 6.0, 80.0, 40_000_000, window_tokens=512),
        result("moba", 8192, (32, 2), skipped=PACKAGE),
        result("moba", 32768, (32, 2), skipped=PACKAGE),
        result("ksa", 8192, (32, 8), 0.4, 1.6, 11_000_000),
        result("window", 8192, (32, 8), 0.1, 0.8, 7_000_000),
        result("moba", 8192, (32, 8), skipped=PACKAGE),
        result("moba", 32768, (32, 8), skipped=PACKAGE),
    ],
}


def test_every_column_is_that_of_its_op_and_shape():
    """Ratios are over KSA with the same heads and length; nothing is compared with KSA of other heads."""
    where, rows, missing, varying = report.tables(RECORD).split("\n\n")
    assert where.startswith("One G, torch 2.1, triton 3.2, cuDNN 91900, commit 012345678, bfloat16, batch 1, ")
    head, *body = rows.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "text tokens", "op", "heads", "visible pairs a head", "forward ms", "/ KSA", "forward + backward ms", "/ KSA",
        "GPU",
    ]  # fmt: skip
    assert body == [
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 8,192 | KSA | 32/2 | 11,000,000 | 0.500 |  | 2.00 |  | G |",
        "| 8,192 | full attention (cudnn) | 32/2 | 33,000,000 | 1.25 | 2.50 | 5.00 | 2.50 | G |",
        "| 8,192 | NSA without its window | 32/2 | 8,000,000 | 1.00 | 2.00 | 3.00 | 1.50 | G |",
        "| 32,768 | KSA | 32/2 | 96,000,000 | 4.00 |  | 160.0 |  | G |",
        "| 32,768 | NSA | 32/2 | 40,000,000 | 6.00 | 1.50 | 80.00 | 0.50 | G |",
        "| 8,192 | KSA | 32/8 | 11,000,000 | 0.400 |  | 1.60 |  | G |",
        "| 8,192 | window alone | 32/8 | 7,000,000 | 0.100 | 0.25 | 0.800 | 0.50 | G |",
    ]
    assert missing == (
        f"Not timed: full attention, heads 32/2 (32,768 tokens): out of memory; MoBA, heads 32/2 and 32/8: {PACKAGE}."
    )
    assert varying == "Gradients that are not the same bits in two calls with the same inputs: NSA."


def test_without_ksa_or_times_there_is_nothing_to_compare():
    """An op without KSA's time has no ratio; a record without any time makes no table."""
    alone = RECORD | {"results": [result("window", 8192, (32, 8), 0.1, 0.8, 7_000_000)], "checks": {}}
    assert report.tables(alone).endswith("| 8,192 | window alone | 32/8 | 7,000,000 | 0.100 |  | 0.800 |  | G |")
    assert report.tables(RECORD | {"results": []}) == "Not measured yet."


def test_the_page_has_the_table_of_the_committed_record(tmp_path):
    page = tmp_path / "results.md"
    shutil.copy(ROOT / "docs" / "results.md", page)
    report.write_report(ROOT / "kernels" / "benchmarks" / "results" / "baselines_h200.json", page)
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"header": HEADER})])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="no record of the benchmarks"):
        report.write_report(path, tmp_path / "page.md")
