"""A function on several gloo processes, for tests that need collectives and no trainer."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from warm import run_script


def run_processes(function: Callable, size: int, folder: Path) -> list:
    """What `function` (of a module, without arguments) returns on each of `size` ranks of one process group."""
    module = sys.modules[function.__module__]
    done = run_script(__file__, module.__file__, function.__name__, folder, ranks=size)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def main(file: str, function: str, folder: str) -> None:
    """Call the function of a module's file, and save what it returns as RANK.pt."""
    # As pytest has them: the module's folder, and that of what all tests share.
    sys.path[:0] = [str(Path(file).parent), str(Path(__file__).parent)]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    try:
        torch.save(getattr(importlib.import_module(Path(file).stem), function)(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
