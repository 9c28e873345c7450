"""Settings of the kernels."""

from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError
from megatron_ksa.kernels import unchecked as waiting

# What is done in one pass over memory where it was several, by name: what it joins.
FUSIONS = {
    "norm": "RMS norm, its weight's gradient and the sum with the residual's gradient; in 16 bits of Transformer "
    "Engine's layers too",
    "activation": "SwiGLU without torch.compile",
    "residual": "the sum with the residual without torch.compile",
    "optimizer": "clipping, Adam (torch's, Transformer Engine's or apex's) and the 16-bit copy of the parameters",
    "gradients": "the first micro-batch's weight gradients overwrite what is in their buffers, which are not zeroed",
    "embedding": "the embedding's gradient is added to its buffer by the rows that occur",
    "checks": "losses and gradients are looked at for NaN once an iteration",
}


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation attention, rotation, norms, gradients and optimizer take.

    Raises:
        UsageError: a fusion that does not exist.
    """

    reference: bool = option(False, "Take the PyTorch reference on a GPU too, to compare with the Triton kernels.")
    apart: tuple[str, ...] = option(
        (), "Take these apart again, to compare: "
        + "; ".join(f"{name} ({what})" for name, what in FUSIONS.items()) + "."
    )  # fmt: skip
    unchecked: bool = option(
        False, "On a GPU, take what no GPU has run yet in its final form: "
        f"{', '.join(sorted(waiting.FUSIONS | waiting.OPS)) or 'nothing in this version'}."
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in self.apart:
            if name not in FUSIONS:
                raise UsageError(f"--kernels-apart {name}: use some of {', '.join(FUSIONS)}")
