"""The kernels around attention, compiled for Hopper at the 1.9B model's sizes (`small_for_hopper.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The kernels of each case, and how many accesses of 16 bytes each has at least: every row that it reads or writes.
EXPECTED = {
    "merge": {"forward_kernel": 3, "backward_kernel": 5},
    "swiglu": {"swiglu_forward_kernel": 3, "swiglu_backward_kernel": 5},
    "adam": {"factors_kernel": 0, "adam_kernel": 8},
    "adam, unclipped": {"adam_kernel": 8},
    "l2_norm": {"squares_kernel": 1},
    "add_rows": {"add_rows_kernel": 3},
    "column_sums": {"column_sums_kernel": 1},
    "norm": {"rms_norm_forward_kernel": 3, "rms_norm_backward_kernel": 5},
    "loss": {"statistics_kernel": 1, "gradients_kernel": 2},
}


@pytest.mark.slow
def test_kernels_compile_for_an_h100():
    """Nothing spills, and rows are read and written in accesses of 16 bytes.

    The interpreter takes what the compiler does not: types that change in a loop, float64 functions, pointers from
    integers.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("small_for_hopper.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert not any(row["spilled"] for row in found), found
    by_case = {(row["case"], row["kernel"]): row["widths"] for row in found}
    for case, kernels in EXPECTED.items():
        for kernel, least in kernels.items():
            assert by_case[case, kernel].get("16", 0) >= least, (case, kernel, by_case[case, kernel])
    # Addresses of gradients' shards need not be multiples of 16.
    assert "16" not in by_case["adam, unaligned", "adam_kernel"]
