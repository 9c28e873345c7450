"""A function on several gloo processes, for tests that need collectives and no trainer."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ksa.platform.ports import free_port


def _process(rank: int, function: Callable, size: int, port: int, folder: str) -> None:
    # Child processes import the tests by their file, so the packages' settings are made here.
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        torch.save(function(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable, size: int, folder: Path) -> list:
    """What `function` (of a module, without arguments) returns on each of `size` ranks of one process group."""
    torch.multiprocessing.spawn(_process, (function, size, free_port(), str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]
