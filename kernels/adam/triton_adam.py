"""A step of Adam over many parameters in one Triton kernel; the formula is in `reference.py`.

A parameter costs 30 bytes of memory traffic: 16 read (parameter, gradient, m, v), 12 written, 2 for the copy. Clipping
in a pass of its own reads and writes the gradients once more, 8 bytes, and copying reads the parameters again, 4.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.adam.chunks import CHUNK, addresses, aligned, chunks, load_pointer, table
from megatron_ksa.kernels.adam.reference import AdamTensors

# Elements that a program reads at a time; it works through a chunk (`CHUNK`) in this many.
BLOCK, WARPS = 2048, 8


@triton.jit
def update(
    p_parameter, p_gradient, p_mean, p_square, p_copy, o, m, has_copy, scale, decay, beta_1, rest_1, beta_2, rest_2,
    eps, step_size, root, DECOUPLED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step for the elements at offsets o [BLOCK] of one parameter; with MASKED only where m is True."""
    if MASKED:
        # [BLOCK]
        b_p = tl.load(p_parameter + o, mask=m)
        b_g = tl.load(p_gradient + o, mask=m)
        b_mean = tl.load(p_mean + o, mask=m)
        b_square = tl.load(p_square + o, mask=m)
    else:
        b_p = tl.load(p_parameter + o)
        b_g = tl.load(p_gradient + o)
        b_mean = tl.load(p_mean + o)
        b_square = tl.load(p_square + o)
    b_g *= scale
    if DECOUPLED:
        b_p -= decay * b_p
    else:
        b_g += decay * b_p
    b_mean = beta_1 * b_mean + rest_1 * b_g
    b_square = beta_2 * b_square + rest_2 * b_g * b_g
    b_p -= step_size * b_mean / (tl.sqrt(b_square) / root + eps)
    if MASKED:
        tl.store(p_parameter + o, b_p, mask=m)
        tl.store(p_mean + o, b_mean, mask=m)
        tl.store(p_square + o, b_square, mask=m)
        tl.store(p_copy + o, b_p.to(p_copy.dtype.element_ty), mask=m & has_copy)
    else:
        tl.store(p_parameter + o, b_p)
        tl.store(p_mean + o, b_mean)
        tl.store(p_square + o, b_square)
        if has_copy:
            tl.store(p_copy + o, b_p.to(p_copy.dtype.element_ty))


@triton.jit
def adam_kernel(
    p_addresses, p_sizes, p_chunks, p_factors, p_scale, p_any_copy, tensors, decay, beta_1, rest_1, beta_2, rest_2,
    eps, DECOUPLED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program updates one chunk of one parameter.

    Args:
        p_addresses: int64 [5, tensors], of parameter, gradient, m, v and copy (0: none).
        p_sizes: int64 [tensors], elements.
        p_chunks: int32 [programs, 2], the parameter of each program and which chunk of it.
        p_factors: float32 [tensors, 2], lr / (1 - beta_1^t) and sqrt(1 - beta_2^t).
        p_scale: float32 [1], which multiplies the gradients; read with SCALED.
        p_any_copy: a pointer of the copies' dtype, which is not read.
        rest_1, rest_2: 1 - beta_1 and 1 - beta_2, which float32 would round from rounded betas.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_tensor = tl.load(p_chunks + 2 * i_program)
    begin = tl.load(p_chunks + 2 * i_program + 1).to(tl.int64) * CHUNK
    size = tl.load(p_sizes + i_tensor)
    p_parameter = load_pointer(p_addresses, 0, i_tensor, tensors, tl.float32, ALIGNED)
    p_gradient = load_pointer(p_addresses, 1, i_tensor, tensors, tl.float32, ALIGNED)
    p_mean = load_pointer(p_addresses, 2, i_tensor, tensors, tl.float32, ALIGNED)
    p_square = load_pointer(p_addresses, 3, i_tensor, tensors, tl.float32, ALIGNED)
    p_copy = load_pointer(p_addresses, 4, i_tensor, tensors, p_any_copy.dtype.element_ty, ALIGNED)
    has_copy = tl.load(p_addresses + 4 * tensors + i_tensor) != 0
    step_size = tl.load(p_factors + 2 * i_tensor)
    root = tl.load(p_factors + 2 * i_tensor + 1)
    scale = 1.0
    if SCALED:
        scale = tl.load(p_scale)
    if begin + CHUNK <= size:
        for i_block in range(0, CHUNK, BLOCK):
            o = begin + i_block + tl.arange(0, BLOCK)
            update(
                p_parameter, p_gradient, p_mean, p_square, p_copy, o, o < size, has_copy, scale, decay,
                beta_1, rest_1, beta_2, rest_2, eps, step_size, root, DECOUPLED, False,
            )  # fmt: skip
    else:
        for i_block in range(0, CHUNK, BLOCK):
            o = begin + i_block + tl.arange(0, BLOCK)
            update(
                p_parameter, p_gradient, p_mean, p_square, p_copy, o, o < size, has_copy, scale, decay,
                beta_1, rest_1, beta_2, rest_2, eps, step_size, root, DECOUPLED, True,
            )  # fmt: skip


@triton.jit
def factors_kernel(p_addresses, p_logarithms, p_factors, tensors, lr, BLOCK: tl.constexpr):
    """Write p_factors of `adam_kernel`, float32 [tensors, 2].

    p_addresses: int64 [tensors], of the float32 step counts t. p_logarithms: float64 [2], log2 of beta_1 and beta_2.
    The arithmetic is float64: 1 - beta^t loses digits in float32 while t is small.
    """
    # [BLOCK]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < tensors
    b_t = tl.load(tl.load(p_addresses + o, mask=m, other=0).to(tl.pointer_type(tl.float32)), mask=m, other=1.0)
    b_t = b_t.to(tl.float64)
    b_1 = 1.0 - tl.exp2(b_t * tl.load(p_logarithms))
    b_2 = 1.0 - tl.exp2(b_t * tl.load(p_logarithms + 1))
    tl.store(p_factors + 2 * o, (lr / b_1).to(tl.float32), mask=m)
    tl.store(p_factors + 2 * o + 1, tl.sqrt(b_2).to(tl.float32), mask=m)


@functools.lru_cache(maxsize=16)
def _logarithms(betas: tuple[float, float], device: torch.device) -> Tensor:
    """log2 of beta_1 and beta_2, float64 [2] on the device; -inf for a beta of 0."""
    return torch.tensor([math.log2(beta) if beta else -math.inf for beta in betas], dtype=torch.float64).to(device)


def _check(tensors: AdamTensors) -> None:
    wide = [*tensors.parameters, *tensors.gradients, *tensors.means, *tensors.squares]
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in wide):
        raise UsageError("Adam needs contiguous float32 parameters, gradients and moments")
    copies = [copy for copy in tensors.copies if copy is not None]
    if len({copy.dtype for copy in copies}) > 1 or not all(copy.is_contiguous() for copy in copies):
        raise UsageError("Adam needs contiguous copies of one dtype")


def adam_step(
    parameters: list[Tensor],
    tensors: AdamTensors,
    scale: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Arguments as in `reference.adam_step`, in two kernels. The host never waits for the device.

    Raises:
        UsageError: dtypes or strides that the kernel does not take.
    """
    _check(tensors)
    device, count = parameters[0].device, len(parameters)
    copies = [copy for copy in tensors.copies if copy is not None]
    *places, steps = (addresses(kind) for kind in tensors)
    sizes, programs = chunks(tuple([parameter.numel() for parameter in parameters]), device)
    if not programs.shape[0]:
        return
    factors = torch.empty(count, 2, dtype=torch.float32, device=device)
    factors_kernel[(triton.cdiv(count, 128),)](
        table((steps,), device), _logarithms(betas, device), factors, count, lr, BLOCK=128
    )
    adam_kernel[(programs.shape[0],)](
        table(tuple(places), device), sizes, programs, factors, factors if scale is None else scale,
        (copies or parameters)[0], count, lr * weight_decay if decoupled else weight_decay,
        betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], eps, DECOUPLED=decoupled, SCALED=scale is not None,
        ALIGNED=aligned(*places), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
