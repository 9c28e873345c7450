"""KSA attention: text queries over windowed text and older summaries, summary queries over their own chunk.

`ksa_attention` takes all rows of a sequence, laid out `[text | summaries]`; `ksa_text_attention` and
`ksa_summary_attention` are its two halves, also for a part of a sequence. `ksa_forward` and `ksa_backward` are its two
passes into memory of the caller's, for autograd functions that attend in several parts. Each takes Triton kernels on a
GPU and `reference` elsewhere. docs/kernels.md lists their shapes.
"""

from megatron_ksa.kernels.dispatch import by_device
from megatron_ksa.kernels.ksa_attention import reference
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

OP = "KSA attention"
_FOLDER = "megatron_ksa.kernels.ksa_attention"

ksa_attention = by_device(OP, f"{_FOLDER}.triton_joint:attention")(reference.attention)
ksa_text_attention = by_device(OP, f"{_FOLDER}.triton_text:text_attention")(reference.text_attention)
ksa_summary_attention = by_device(OP, f"{_FOLDER}.triton_summary:summary_attention")(reference.summary_attention)
ksa_forward = by_device(OP, f"{_FOLDER}.triton_passes:forward")(reference.forward)
ksa_backward = by_device(OP, f"{_FOLDER}.triton_passes:backward")(reference.backward)

__all__ = [
    "KSAGeometry", "ksa_attention", "ksa_backward", "ksa_forward", "ksa_summary_attention", "ksa_text_attention",
    "reference",
]  # fmt: skip
