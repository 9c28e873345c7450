"""Triton's interpreter, as tests/interpreter_once.py has it, ends a kernel whose integers overflow."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language import standard
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(isinstance(standard.sum, triton.runtime.JITFunction), reason="needs TRITON_INTERPRET=1")


@triton.jit
def _scaled(out, rows, OPERATION: tl.constexpr):
    if OPERATION == "mul":
        value = rows * rows
    elif OPERATION == "add":
        value = rows + rows
    else:
        value = -rows - rows - rows
    tl.store(out, value)


@pytest.mark.parametrize("operation", ["mul", "add", "sub"])
def test_32_bits_that_overflow_end_the_kernel(operation):
    """Triton computed whether they do at every operation and looked at no result: offsets that wrap passed."""
    out = torch.zeros(1, dtype=torch.int64)
    _scaled[(1,)](out, 1000, operation)
    assert abs(int(out)) >= 2000
    with pytest.raises(InterpreterError, match=f"int32 overflows in {operation}"):
        _scaled[(1,)](out, 2**30, operation)
