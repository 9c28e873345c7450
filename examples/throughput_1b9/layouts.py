"""Parallel layouts of the throughput script by short names: `one`, `cp4`, `cp4-a2a`, `tp2-cp2`."""

import re
from dataclasses import dataclass

from megatron_ksa.errors import UsageError

PART = re.compile(r"(tp|cp)([1-9]\d*)")
# Gradients are reduced while the backward pass runs, parameters gathered while the next forward pass does.
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
# A rank whose collector runs stops all ranks: every rank's runs at the same iterations.
COLLECTOR = ["--manual-gc", "--manual-gc-interval", "100"]


@dataclass(frozen=True)
class Layout:
    """GPUs of a run, tensor x context parallel.

    Attributes:
        name: as on the command line.
        comm: `--cp-comm-type`.
    """

    name: str
    tensor: int = 1
    context: int = 1
    comm: str = "p2p"

    @property
    def gpus(self) -> int:
        """Processes, one a GPU."""
        return self.tensor * self.context

    @property
    def flags(self) -> list[str]:
        """The layout's own flags of `pretrain_gpt.py`."""
        flags = [] if self.gpus == 1 else [*OVERLAP, *COLLECTOR]
        if self.tensor > 1:
            flags += ["--tensor-model-parallel-size", str(self.tensor), "--sequence-parallel"]
        if self.context > 1:
            flags += ["--context-parallel-size", str(self.context), "--cp-comm-type", self.comm]
        return flags


def parse_layout(name: str) -> Layout:
    """The layout of a name: `one`, or `tpN` and `cpN` joined by hyphens, with `a2a` for all-to-all.

    Raises:
        UsageError: another name.
    """
    if name == "one":
        return Layout(name)
    sizes, comm = {}, "p2p"
    for part in name.split("-"):
        found = PART.fullmatch(part)
        if part == "a2a" and "cp" in sizes:
            comm = part
        elif found and found[1] not in sizes:
            sizes[found[1]] = int(found[2])
        else:
            raise UsageError(f"--layouts {name}: use one, cp4, cp4-a2a, tp2-cp2 or the like")
    return Layout(name, sizes.get("tp", 1), sizes.get("cp", 1), comm)
