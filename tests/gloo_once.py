"""One gloo device a process in place of one for every process group, whose thread wakes 100 times a second.

Some 20 groups of a run stay: ranks that trained 11 layouts in turn had 590 threads.
"""

import functools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


@functools.cache
def _device(process: int) -> object:
    return dist.ProcessGroupGloo.create_default_device()


class SharedDevice(dist.ProcessGroupGloo):
    """A group on the process's device."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta = timedelta(minutes=30), **others: object
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = [_device(os.getpid())], timeout, 2
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Have all groups that this process and its forks make from now on use one device, each process its own."""
    distributed_c10d.ProcessGroupGloo = SharedDevice
