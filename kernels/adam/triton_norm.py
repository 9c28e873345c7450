"""L2 norm of many tensors: one Triton kernel sums the squares of each chunk, torch adds these sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.adam.chunks import CHUNK, addresses, aligned, chunks, load_pointer, table

BLOCK, WARPS = 2048, 8


@triton.jit
def squares_kernel(
    p_addresses, p_sizes, p_chunks, p_sums, tensors, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums the squares of one chunk of one tensor into p_sums, float32 [programs].

    p_addresses, p_sizes, p_chunks: as in `adam_kernel`, of one kind of tensors.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_tensor = tl.load(p_chunks + 2 * i_program)
    begin = tl.load(p_chunks + 2 * i_program + 1).to(tl.int64) * CHUNK
    size = tl.load(p_sizes + i_tensor)
    p_tensor = load_pointer(p_addresses, 0, i_tensor, tensors, tl.float32, ALIGNED)
    # [BLOCK]
    b_sum = tl.zeros([BLOCK], tl.float32)
    if begin + CHUNK <= size:
        for i_block in range(0, CHUNK, BLOCK):
            b = tl.load(p_tensor + begin + i_block + tl.arange(0, BLOCK))
            b_sum += b * b
    else:
        for i_block in range(0, CHUNK, BLOCK):
            o = begin + i_block + tl.arange(0, BLOCK)
            b = tl.load(p_tensor + o, mask=o < size, other=0.0)
            b_sum += b * b
    tl.store(p_sums + i_program, tl.sum(b_sum, axis=0))


def l2_norm(tensors: list[Tensor]) -> Tensor:
    """Float32 [1], arguments as in `reference.l2_norm`.

    Raises:
        UsageError: dtypes or strides that the kernel does not take.
    """
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in tensors):
        raise UsageError("the norm needs contiguous float32 tensors")
    device, places = tensors[0].device, addresses(tensors)
    sizes, programs = chunks(tuple([tensor.numel() for tensor in tensors]), device)
    sums = torch.empty(max(programs.shape[0], 1), dtype=torch.float32, device=device)
    if not programs.shape[0]:
        return sums.zero_()
    squares_kernel[(programs.shape[0],)](
        table((places,), device), sizes, programs, sums, len(tensors), ALIGNED=aligned(places), CHUNK=CHUNK,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return sums.sum().sqrt().view(1)
