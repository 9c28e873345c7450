"""SwiGLU in Triton: kernels, launches, autograd, public function; formulas in `reference.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.launch import launch, repeatable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK, WARPS = 1024, 4


@triton.jit
def load(p, m, FULL: tl.constexpr):
    """Float32 values at pointers p; with FULL all of them, else those where m is True and 0 elsewhere."""
    if FULL:
        return tl.load(p).to(tl.float32)
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store(p, b, m, FULL: tl.constexpr):
    """Round b to the dtype of p and store it; with FULL everywhere, else where m is True."""
    if FULL:
        tl.store(p, b.to(p.dtype.element_ty))
    else:
        tl.store(p, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def swiglu_forward_kernel(p_x, p_y, size, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """A program computes BLOCK columns of one row: p_x [rows, 2 size], p_y [rows, size]; grid (rows, blocks)."""
    i_row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_a = load(p_x + i_row * 2 * size + o, m, FULL)
    b_b = load(p_x + i_row * 2 * size + size + o, m, FULL)
    store(p_y + i_row * size + o, b_a * tl.sigmoid(b_a) * b_b, m, FULL)


@triton.jit
def swiglu_backward_kernel(p_x, p_dy, p_dx, size, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """As `swiglu_forward_kernel`; p_dy [rows, size], p_dx [rows, 2 size]."""
    i_row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_a = load(p_x + i_row * 2 * size + o, m, FULL)
    b_b = load(p_x + i_row * 2 * size + size + o, m, FULL)
    b_dy = load(p_dy + i_row * size + o, m, FULL)
    b_s = tl.sigmoid(b_a)
    store(p_dx + i_row * 2 * size + o, b_dy * b_b * b_s * (1.0 + b_a * (1.0 - b_s)), m, FULL)
    store(p_dx + i_row * 2 * size + size + o, b_dy * b_a * b_s, m, FULL)


def _sizes(size: int) -> dict[str, int | bool]:
    block = min(BLOCK, triton.next_power_of_2(size))
    return {"BLOCK": block, "FULL": size % block == 0, "num_warps": WARPS}


@repeatable
def _launch_forward(tensors: tuple[Tensor, ...], settings: None) -> None:
    """tensors: x, y."""
    x, y = tensors
    rows, size = y.shape
    sizes = _sizes(size)
    launch(swiglu_forward_kernel, (rows, triton.cdiv(size, sizes["BLOCK"])), x, y, size, **sizes)


@repeatable
def _launch_backward(tensors: tuple[Tensor, ...], settings: None) -> None:
    """tensors: x, the gradients of y and of x."""
    x, d_y, d_x = tensors
    rows, size = d_y.shape
    sizes = _sizes(size)
    launch(swiglu_backward_kernel, (rows, triton.cdiv(size, sizes["BLOCK"])), x, d_y, d_x, size, **sizes)


def _rows(tensor: Tensor) -> Tensor:
    """[..., size] -> contiguous [rows, size]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = _rows(x)
        ctx.save_for_backward(rows)
        y = x.new_empty(rows.shape[0], rows.shape[1] // 2)
        if y.numel():
            _launch_forward((rows, y), None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        if x.numel():
            _launch_backward((x, _rows(d_y), d_x), None)
        return d_x.view(*d_y.shape[:-1], d_x.shape[-1])


def swiglu(x: Tensor) -> Tensor:
    """Arguments and result as in `reference.swiglu`; arithmetic is float32.

    Raises:
        UsageError: a dtype that the kernels do not take, or an odd number of channels.
    """
    if x.dtype not in DTYPES or x.shape[-1] % 2:
        raise UsageError(
            f"SwiGLU got {x.dtype} rows of {x.shape[-1]} channels: use bfloat16, float16 or float32 and an even number"
        )
    return _SwiGLU.apply(x)
