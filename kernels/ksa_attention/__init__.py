"""KSA attention: text queries over windowed text and older summaries, summary queries over their own chunk."""

from megatron_ksa.kernels.ksa_attention.dispatch import attention as ksa_attention
from megatron_ksa.kernels.ksa_attention.dispatch import summary_attention as ksa_summary_attention
from megatron_ksa.kernels.ksa_attention.dispatch import text_attention as ksa_text_attention
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

__all__ = ["KSAGeometry", "ksa_attention", "ksa_summary_attention", "ksa_text_attention"]
