"""Tables by which one kernel goes over many tensors: addresses, and the chunk of a tensor that is each program's."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tensor that a program takes.
CHUNK = 8192
# Addresses that let a thread load 16 bytes of every tensor.
ALIGNMENT = 16


@triton.jit
def load_pointer(p_addresses, i_kind: tl.constexpr, i_tensor, tensors, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a kind of tensor of a parameter, from int64 [kinds, tensors]."""
    pointer = tl.load(p_addresses + i_kind * tensors + i_tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def addresses(tensors: list[Tensor | None]) -> tuple[int, ...]:
    """Of each tensor; 0 where there is none."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def aligned(*kinds: tuple[int, ...]) -> bool:
    """Whether all addresses are multiples of `ALIGNMENT`."""
    return not any(address % ALIGNMENT for kind in kinds for address in kind)


@functools.lru_cache(maxsize=16)
def chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Elements of each tensor, int64 [tensors]; tensor and chunk of each program, int32 [programs, 2]."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensor = torch.repeat_interleave(counts)
    chunk = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    programs = torch.stack([tensor, chunk], dim=1).to(torch.int32)
    return torch.tensor(sizes, dtype=torch.int64).to(device), programs.to(device)


@functools.lru_cache(maxsize=16)
def table(kinds: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Addresses, int64 [kinds, tensors], on the device."""
    return torch.tensor(kinds, dtype=torch.int64).to(device)
