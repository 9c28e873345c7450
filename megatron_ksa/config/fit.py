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
        UsageError: a margin that is no number of at least 0.
    """

    margin: float | None = option(
        None, "Recompute in the backward pass, on each pipeline stage, what takes the least time among what fits the "
        "GPU with this many GiB to spare: nothing, norms, heads, activations and the MLP of layers, the first layers "
        f"whole, all. Without a number, {MARGIN:g} GiB. Takes the place of --recompute-granularity and its like.",
        flag="--recompute-to-fit", alone=MARGIN,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise UsageError(f"--recompute-to-fit is {self.margin:g}: GiB to spare, a number of at least 0")
