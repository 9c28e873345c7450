"""Whether a decoding state fits the device, before anything is allocated."""

from collections.abc import Callable
from decimal import Decimal

import torch

from megatron_ksa.errors import UsageError

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated: on a GPU what the driver has free and torch holds unused, else Linux's estimate."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63


def check_room(
    sequence_bytes: int, max_batch: int, max_length: int, device: torch.device, bytes_of: Callable[[int], int]
) -> None:
    """Refuse a state that does not fit.

    Args:
        sequence_bytes: of one sequence of max_length tokens.
        bytes_of: bytes of one sequence by its length.

    Raises:
        UsageError: with the numbers that fit.
    """
    free = free_bytes(device)
    needed = sequence_bytes * max_batch
    if needed <= free:
        return
    low, high = 0, max_length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle) * max_batch <= free else (low, middle - 1)
    raise UsageError(
        f"{max_batch} sequences of {max_length} tokens need {Decimal(needed) / GIB:.1f} GiB of keys and values, "
        f"{free / GIB:.1f} GiB are free: with this batch at most {low} tokens fit (--max-length), with this length "
        f"{free // sequence_bytes} sequences (--batch)"
    )
