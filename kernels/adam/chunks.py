"""Tables by which one kernel works on many tensors: their addresses, and which chunk of which tensor a program has."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a chunk: what one program works on.
CHUNK = 8192
# Bytes: where every address is a multiple of this, a thread loads 16 bytes at a time.
ALIGNMENT = 16


@triton.jit
def load_pointer(p_addresses, i_kind: tl.constexpr, i_tensor, tensors, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to tensor i_tensor of one kind (0 for parameters, 1 for gradients ...), from int64 [kinds, tensors]."""
    pointer = tl.load(p_addresses + i_kind * tensors + i_tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def addresses(tensors: list[Tensor | None]) -> tuple[int, ...]:
    """Address of each tensor in bytes; 0 for None."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def aligned(*kinds: tuple[int, ...]) -> bool:
    """Whether all addresses are multiples of `ALIGNMENT`."""
    return not any(address % ALIGNMENT for kind in kinds for address in kind)


@functools.lru_cache(maxsize=16)
def chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of elements of each tensor, int64 [tensors]; tensor and chunk of each program, int32 [programs, 2]."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensor = torch.repeat_interleave(counts)
    chunk = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    programs = torch.stack([tensor, chunk], dim=1).to(torch.int32)
    return torch.tensor(sizes, dtype=torch.int64).to(device), programs.to(device)


@functools.lru_cache(maxsize=16)
def table(kinds: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Addresses, int64 [kinds, tensors], on the device."""
    return torch.tensor(kinds, dtype=torch.int64).to(device)
