"""Compiles the kernels of a decoding step for compute capability 9.0 without a GPU; a JSON line each.

Each line has the kernel's name, bytes of shared memory, asynchronous copies of 16 bytes, and accesses of spilled
registers. See tests/kernels/ksa_attention/compile_for_hopper.py, whose stand-in for the driver it takes.
"""

import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "ksa_attention"))
from compile_for_hopper import Driver, report, twice  # noqa: E402

from megatron_ksa.kernels.ksa_decode import CacheGeometry, triton_decode  # noqa: E402


def copies_and_spills(words: list[str]) -> dict:
    return {
        "copies": sum(word.startswith("LDGSTS") and ".128" in word for word in words),
        "spilled": sum(word.split(".")[0] in ("LDL", "STL") for word in words),
    }


def step(geometry, rows):
    """A step of two sequences in bf16 with the heads of Qwen3-4B."""
    q, k, v = (torch.zeros(rows, 2, heads, 128, dtype=torch.bfloat16) for heads in (32, 8, 8))
    key, value = (torch.zeros(2, 8, geometry.rows, 128, dtype=torch.bfloat16) for _ in range(2))
    places = torch.zeros(2, dtype=torch.int64)
    triton_decode.decode_attention(q, k, v, key, value, places, places, geometry)


def main() -> None:
    """Compile and report."""
    triton.runtime.driver.set_active(Driver())
    triton_decode._multiprocessors = lambda device: 132
    triton_decode._launch = twice(triton_decode._launch)
    for rows in (2, 1):
        step(CacheGeometry(8, 1, 1032, 256), rows)
    step(CacheGeometry(1, 0, 2048, 0), 1)
    report("decode", copies_and_spills)


if __name__ == "__main__":
    main()
