"""All kernels, compiled for Hopper where there is none (`all_for_hopper.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SHARED_MEMORY = 227 * 1024
# The kernels of each case, and how many accesses of 16 bytes each has at least: every row that it reads or writes.
EXPECTED = {
    "merge": {"merge_kernel": 3},
    "swiglu": {"swiglu_forward_kernel": 3, "swiglu_backward_kernel": 5},
    "adam": {"factors_kernel": 0, "adam_kernel": 8},
    "adam, unclipped": {"adam_kernel": 8},
    "l2_norm": {"squares_kernel": 1},
    "add_rows": {"add_rows_kernel": 3},
    "column_sums": {"column_sums_kernel": 1},
    "norm": {"rms_norm_forward_kernel": 3, "rms_norm_backward_kernel": 5},
    "loss": {"statistics_kernel": 1, "gradients_kernel": 2},
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """The lines of attention, decode and small."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("all_for_hopper.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {
        kernels: [row for row in found if row["kernels"] == kernels] for kernels in ("attention", "decode", "small")
    }


def test_small_kernels_read_and_write_16_bytes(compiled):
    """Nothing spills, and rows are read and written in accesses of 16 bytes.

    The interpreter takes what the compiler does not: types that change in a loop, float64 functions, pointers from
    integers.
    """
    found = compiled["small"]
    assert not any(row["spilled"] for row in found), found
    by_case = {(row["case"], row["kernel"]): row["widths"] for row in found}
    for case, kernels in EXPECTED.items():
        for kernel, least in kernels.items():
            assert by_case[case, kernel].get("16", 0) >= least, (case, kernel, by_case[case, kernel])
    # Addresses of gradients' shards need not be multiples of 16.
    assert "16" not in by_case["adam, unaligned", "adam_kernel"]


def test_attention_kernels_keep_products_in_flight_and_launches_repeat(compiled):
    """Also: products are in flight together; the compiler made dK and dV wait for each of 48 for want of registers.

    And what `kernels/launch.py` repeats is what Triton's own launch hands to the driver (`compile_for_hopper.py`).
    """
    found = compiled["attention"]
    specialised = [row for row in found if row["case"] in ("joint", "joint, documents", "segment")]
    assert [row["kernel"] for row in specialised] == ["_forward_kernel", "_dq_kernel", *["_dkv_kernel"] * 2] * 3
    # Without summaries nothing is launched for them.
    window = [row["kernel"] for row in found if row["case"] == "window"]
    assert window == ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]
    assert {row["kernel"] for row in found} > {"_summary_forward_kernel", "_summary_backward_kernel"}
    assert all(0 < row["shared"] <= SHARED_MEMORY for row in found), found
    assert all(0 < row["waits"] <= row["products"] // 4 for row in specialised), found


def test_decoding_kernels_copy_16_bytes_and_three_programs_fit(compiled):
    """In bf16: keys and values go to shared memory by copies of 16 bytes, nothing spills, three programs fit.

    And what `kernels/launch.py` repeats is what Triton's own launch hands to the driver.
    """
    found = compiled["decode"]
    assert {row["kernel"] for row in found} == {"keep_kernel", "text_kernel", "merge_kernel", "summary_kernel"}
    assert not any(row["spilled"] for row in found), found
    for row in found:
        if row["kernel"] == "text_kernel":
            assert row["copies"] >= 16 and 3 * row["shared"] <= SHARED_MEMORY, row
