"""RMS norm in Triton: kernels, launches, autograd, public function; formulas in `reference.py`.

torch's fused norm reads the input and the output's gradient twice in its backward pass, once for the gradient of the
rows and once for that of the weight, and autograd adds the residual's gradient in a kernel of its own: 8 passes over
rows where `rms_norm_backward_kernel` makes 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.column_sums import column_sums
from megatron_ksa.kernels.launch import launch, repeatable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_SIZE = 16384
# Programs of the backward pass at most; each writes its part of the weight's gradient. The number is the same on every
# GPU, so that sums have the same order everywhere.
PROGRAMS = 1056


@triton.jit
def rms_norm_forward_kernel(
    p_x, p_weight, p_y, p_rstd, size, eps, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A program normalises one row: p_x, p_y [rows, size], p_rstd float32 [rows], 1 / rms of each row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_size = tl.arange(0, BLOCK)
    if FULL:
        # [BLOCK]
        b_x = tl.load(p_x + i_row * size + o_size).to(tl.float32)
        b_gain = tl.load(p_weight + o_size).to(tl.float32)
    else:
        b_x = tl.load(p_x + i_row * size + o_size, mask=o_size < size, other=0.0).to(tl.float32)
        b_gain = tl.load(p_weight + o_size, mask=o_size < size, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        b_gain += 1.0
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / size + eps)
    tl.store(p_rstd + i_row, rstd)
    b_y = (b_x * rstd * b_gain).to(p_y.dtype.element_ty)
    if FULL:
        tl.store(p_y + i_row * size + o_size, b_y)
    else:
        tl.store(p_y + i_row * size + o_size, b_y, mask=o_size < size)


@triton.jit
def rms_norm_backward_kernel(
    p_x, p_weight, p_rstd, p_dy, p_residual, p_dx, p_dweight, rows, size, RESIDUAL: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Program i of n works on rows i, i + n, i + 2 n and so on.

    p_x, p_dy, p_dx: [rows, size]. p_rstd: float32 [rows]. p_residual: gradient of the residual [rows, size], with
    RESIDUAL. p_dweight: float32 [programs, size], each program's part of the weight's gradient.
    """
    i_program = tl.program_id(0)
    o_size = tl.arange(0, BLOCK)
    m_size = o_size < size
    if FULL:
        b_gain = tl.load(p_weight + o_size).to(tl.float32)
    else:
        b_gain = tl.load(p_weight + o_size, mask=m_size, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        b_gain += 1.0
    b_dweight = tl.zeros([BLOCK], tl.float32)
    for i_row in range(i_program, rows, tl.num_programs(0)):
        o_row = tl.cast(i_row, tl.int64) * size + o_size
        # [BLOCK]
        if FULL:
            b_x = tl.load(p_x + o_row).to(tl.float32)
            b_dy = tl.load(p_dy + o_row).to(tl.float32)
        else:
            b_x = tl.load(p_x + o_row, mask=m_size, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dy + o_row, mask=m_size, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + i_row)
        b_x *= rstd
        b_dweight += b_dy * b_x
        b_dy *= b_gain
        b_dx = (b_dy - b_x * (tl.sum(b_dy * b_x, axis=0) / size)) * rstd
        if FULL:
            if RESIDUAL:
                b_dx += tl.load(p_residual + o_row).to(tl.float32)
            tl.store(p_dx + o_row, b_dx.to(p_dx.dtype.element_ty))
        else:
            if RESIDUAL:
                b_dx += tl.load(p_residual + o_row, mask=m_size, other=0.0).to(tl.float32)
            tl.store(p_dx + o_row, b_dx.to(p_dx.dtype.element_ty), mask=m_size)
    p_part = p_dweight + tl.cast(i_program, tl.int64) * size + o_size
    if FULL:
        tl.store(p_part, b_dweight)
    else:
        tl.store(p_part, b_dweight, mask=m_size)


def _sizes(size: int, zero_centered: bool) -> dict[str, int | bool]:
    block = triton.next_power_of_2(size)
    # 16 elements a thread, in loads of 16 bytes.
    warps = min(max(block // 512, 1), 16)
    return {"ZERO_CENTERED": zero_centered, "BLOCK": block, "FULL": block == size, "num_warps": warps}


@repeatable
def _launch_forward(tensors: tuple[Tensor, ...], settings: tuple[float, bool]) -> None:
    """tensors: x, weight, y, rstd."""
    x, weight, y, rstd = tensors
    eps, zero_centered = settings
    rows, size = x.shape
    launch(rms_norm_forward_kernel, (rows,), x, weight, y, rstd, size, eps, **_sizes(size, zero_centered))


@repeatable
def _launch_backward(tensors: tuple[Tensor | None, ...], settings: bool) -> None:
    """tensors: x, weight, rstd, the gradients of y, of the residual (or None), of x, of the weight by program."""
    x, weight, rstd, d_y, d_residual, d_x, d_weight = tensors
    rows, size = x.shape
    launch(
        rms_norm_backward_kernel, (d_weight.shape[0],), x, weight, rstd, d_y,
        d_y if d_residual is None else d_residual, d_x, d_weight, rows, size, RESIDUAL=d_residual is not None,
        **_sizes(size, settings),
    )  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    """[..., size] -> contiguous [rows, size]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _NormBesideResidual(torch.autograd.Function):
    """(y, x): the gradient that comes back for x is added to that of the norm in the same kernel."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        y, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        if rows.shape[0]:
            _launch_forward((rows, weight, y, rstd), (eps, zero_centered))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.zero_centered = zero_centered
        return y.view(x.shape), x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_y: Tensor | None, d_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_y is None:
            return d_residual, None, None, None
        x, weight, rstd = ctx.saved_tensors
        rows, size = x.shape
        d_x = torch.empty_like(x)
        parts = torch.empty(min(rows, PROGRAMS), size, dtype=torch.float32, device=x.device)
        if rows:
            residual = None if d_residual is None else _rows(d_residual)
            _launch_backward((x, weight, rstd, _rows(d_y), residual, d_x, parts), ctx.zero_centered)
        d_weight = column_sums(parts, weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x.view(d_y.shape), d_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `reference.rms_norm`; sums and products are float32. Deterministic.

    Raises:
        UsageError: dtypes or a size that the kernels do not take.
    """
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise UsageError(f"RMS norm got {x.dtype} rows and a {weight.dtype} weight: use bfloat16, float16 or float32")
    if weight.shape != x.shape[-1:] or x.shape[-1] > LARGEST_SIZE:
        raise UsageError(
            f"RMS norm got rows of {x.shape[-1]} and a weight of shape {tuple(weight.shape)}: both need the same size, "
            f"at most {LARGEST_SIZE}"
        )
    return _NormBesideResidual.apply(x, weight, eps, zero_centered)
