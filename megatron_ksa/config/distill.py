"""Settings of the first stage from a dense model: distillation of its summary parameters."""

import math
from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError

WEIGHTS = ("ce_weight", "kl_weight", "attention_weight", "cosine_weight")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of a KSA model from the dense model that has the same weights (KSA report, arXiv 2604.24432).

    Loss = ce_weight * CE + kl_weight * KL + attention_weight * A + cosine_weight * cosine.

    Raises:
        UsageError: a value out of range.
    """

    enabled: bool = option(
        False, "Train the summary parameters to match a teacher: the same weights in the same step with full causal "
        "attention in every layer and without summary rows.", flag="--ksa-distill"
    )  # fmt: skip
    ce_weight: float = option(1.0, "Weight of the cross-entropy with the labels.")
    kl_weight: float = option(5.0, "Weight of KL(teacher || student) over the vocabulary.")
    attention_weight: float = option(
        5.0, "Weight of the squared difference of student's and teacher's attention outputs, after the output "
        "projection, mean over text rows, their elements and the KSA layers."
    )  # fmt: skip
    cosine_weight: float = option(
        0.0, "Weight of 1 - cos(student, teacher) of the attention outputs, mean over text rows and KSA layers."
    )
    clamp: float = option(0.1, "Largest squared difference of an element; beyond it the gradient is 0.")
    normalize: bool = option(
        False, "Divide each row's attention output by its root mean square before student and teacher are compared."
    )
    offload: bool = option(
        False, "The teacher's attention outputs wait in pinned host memory until the student's layer is there, with "
        "activation recompute: text rows * hidden size elements of each KSA layer less on the GPU."
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--ksa-distill-{name.replace('_', '-')} is {value:g}: use 0 or more")
        if not (math.isfinite(self.clamp) and self.clamp > 0):
            raise UsageError(f"--ksa-distill-clamp is {self.clamp:g}: it must be above 0")
        if self.enabled and not any(getattr(self, name) for name in WEIGHTS):
            raise UsageError("--ksa-distill with all four weights 0 has nothing to train: give one of them a value")
        if self.offload and not (self.enabled and self.compares_attention):
            raise UsageError(
                "--ksa-distill-offload keeps the teacher's attention outputs on the host, and this run compares none: "
                "drop it, or give --ksa-distill and a weight of the attention term"
            )

    @property
    def compares_attention(self) -> bool:
        """Whether the layers' attention outputs count."""
        return self.attention_weight > 0 or self.cosine_weight > 0
