"""Settings of recompute that is chosen by the memory model."""

import math
from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError

# GiB for what the model does not count: CUDA's context, communication buffers, the allocator's fragments.
MARGIN = 4.0


@dataclass(frozen=True)
class FitConfig:
    """Recompute of activations, chosen to fit the GPU's memory.

    Raises:
        UsageError: a margin that is no number of at least 0; a size that is no number above 0, or without a margin.
    """

    margin: float | None = option(
        None, "Recompute in the backward pass, on each pipeline stage, what takes the least time among what fits the "
        "GPU with this many GiB to spare: nothing, norms, heads, activations and the MLP of layers, the first layers "
        f"whole, all. Without a number, {MARGIN:g} GiB. Takes the place of --recompute-granularity and its like.",
        flag="--recompute-to-fit", alone=MARGIN,
    )  # fmt: skip
    gpu: float | None = option(
        None, "GiB of the GPU that --recompute-to-fit fills, in place of the smallest GPU of all ranks: the same "
        "choice on other GPUs.", flag="--recompute-to-fit-gpu",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise UsageError(f"--recompute-to-fit is {self.margin:g}: GiB to spare, a number of at least 0")
        if self.gpu is None:
            return
        if not 0 < self.gpu < math.inf:
            raise UsageError(f"--recompute-to-fit-gpu is {self.gpu:g}: GiB of a GPU, a number above 0")
        if self.margin is None:
            raise UsageError("--recompute-to-fit-gpu says what --recompute-to-fit fills, which is missing: add it")
