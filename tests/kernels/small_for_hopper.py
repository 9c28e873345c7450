"""Compiles the kernels around attention for compute capability 9.0 without a GPU; a JSON line each.

Rows, heads and dtypes are those of the 1.9B model. Each line has the case, the kernel's name, bytes of shared memory,
accesses of global memory by their width in bytes, and accesses of spilled registers. See
tests/kernels/ksa_attention/compile_for_hopper.py, whose stand-in for the driver it takes.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "ksa_attention"))
from compile_for_hopper import Driver, Utilities, report, twice  # noqa: E402

from megatron_ksa.kernels import column_sums, embedding_gradient, unchecked  # noqa: E402
from megatron_ksa.kernels.adam import AdamTensors, triton_adam, triton_norm  # noqa: E402
from megatron_ksa.kernels.cross_entropy import triton_kernels as cross_entropy  # noqa: E402
from megatron_ksa.kernels.norm import triton_norm as rms  # noqa: E402
from megatron_ksa.kernels.softmax_merge import triton_kernels as softmax_merge  # noqa: E402
from megatron_ksa.kernels.swiglu import triton_swiglu  # noqa: E402

HIDDEN, FFN, HEADS, HEAD_DIM, WORDS = 2048, 6144, 16, 128, 151936


def accesses(words: list[str]) -> dict:
    """Accesses of global memory by their width in bytes, and those of spilled registers."""
    parts = [word.split(".") for word in words]
    widths = Counter(_bytes(word) for word in parts if word[0] in ("LDG", "STG"))
    return {"spilled": sum(word[0] in ("LDL", "STL") for word in parts), "widths": dict(widths)}


def _bytes(word: list[str]) -> int:
    """Of an access: LDG.E.128 takes 16, LDG.E.U16 2, LDG.E 4."""
    sizes = [int(part.lstrip("US")) // 8 for part in word[2:] if part.lstrip("US").isdigit()]
    return sizes[0] if sizes else 4


def rows(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(size, dtype=dtype).requires_grad_()


def merge(rows_of_heads: int) -> None:
    a, b = (torch.zeros(1, rows_of_heads, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    lse_a, lse_b = (torch.zeros(1, HEADS, rows_of_heads) for _ in range(2))
    softmax_merge.merge_into(a, lse_a, b, lse_b)


def swiglu(size: int) -> None:
    y = triton_swiglu.swiglu(rows(8, 1, 2 * size))
    y.backward(torch.zeros_like(y))


def adam(scale: Tensor | None, offset: int = 0, sizes: tuple[int, ...] = (HIDDEN * 8, HIDDEN, HEAD_DIM)) -> None:
    def kind(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.zeros(size + offset, dtype=dtype)[offset:] for size in sizes]

    wide = kind()
    tensors = AdamTensors(wide, kind(), kind(), kind(), kind(torch.bfloat16), [torch.ones(()) for _ in sizes])
    triton_adam.adam_step(
        wide, tensors, scale, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decoupled=True
    )  # fmt: skip


def norm() -> None:
    x = rows(8, 1, HIDDEN)
    outputs = rms.rms_norm(x, rows(HIDDEN), 1e-6)
    torch.autograd.backward(outputs, [torch.zeros_like(x)] * 2)


def loss() -> None:
    logits, labels = torch.zeros(8, WORDS, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    statistics = cross_entropy.statistics(logits, labels, 1.0)
    cross_entropy.gradients(logits, labels, *statistics[:2], torch.ones(8), 1.0)


CASES = {
    "merge": lambda: merge(64),
    "merge, ragged": lambda: merge(37),
    "swiglu": lambda: swiglu(FFN),
    "swiglu, ragged": lambda: swiglu(FFN + 8),
    "adam": lambda: adam(torch.ones(1)),
    "adam, unclipped": lambda: adam(None),
    "adam, one parameter": lambda: adam(torch.ones(1), sizes=(WORDS,)),
    "adam, unaligned": lambda: adam(torch.ones(1), offset=1),
    "l2_norm": lambda: triton_norm.l2_norm([torch.zeros(HIDDEN * 8), torch.zeros(33)]),
    "add_rows": lambda: embedding_gradient._add_rows(
        torch.zeros(64, dtype=torch.int64), torch.zeros(64, HIDDEN, dtype=torch.bfloat16), torch.zeros(4, HIDDEN)
    ),
    "column_sums": lambda: column_sums.column_sums(torch.zeros(1056, HIDDEN), torch.bfloat16),
    "column_sums of heads": lambda: column_sums.column_sums(torch.zeros(1024, 2, HEAD_DIM), torch.bfloat16),
    "norm": norm,
    "loss": loss,
}


def main(cases: Iterable[str] = ()) -> None:
    """Compile and report these cases, or all."""
    triton.runtime.driver.set_active(Driver())
    unchecked.take_unchecked()
    for module in (triton_swiglu, rms):
        module._launch_forward = twice(module._launch_forward)
        module._launch_backward = twice(module._launch_backward)
    column_sums._launch = twice(column_sums._launch)
    for Utilities.case in cases or CASES:
        CASES[Utilities.case]()
    report("small", accesses)


if __name__ == "__main__":
    main(sys.argv[1:])
