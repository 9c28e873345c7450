"""KSA attention: text queries over windowed text and older summaries, summary queries over their own chunk."""

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.reference import summary_attention as ksa_summary_attention
from megatron_ksa.kernels.ksa_attention.reference import text_attention as ksa_text_attention

__all__ = ["KSAGeometry", "ksa_attention", "ksa_summary_attention", "ksa_text_attention"]


def ksa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: KSAGeometry,
    *,
    text_rows: int,
    document_start: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """KSA among rows laid out `[text | summaries]`.

    Args:
        q: [B, text_rows + summary rows, Hq, D]; a ragged last chunk has no summaries.
        k, v: [B, text_rows + summary rows, Hkv, D].
        document_start: int32 [B, text_rows] position of the first token of each token's document, or None.

    Returns:
        [B, text_rows + summary rows, Hq, D] in q's dtype.
    """
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary) = (
        rows.split([text_rows, rows.shape[1] - text_rows], dim=1) for rows in (q, k, v)
    )
    options = {"document_start": document_start, "softmax_scale": softmax_scale}
    out, _ = ksa_text_attention(q_text, k_text, v_text, k_summary, v_summary, geometry, **options)
    if not q_summary.shape[1]:
        return out
    whole = text_rows // geometry.chunk_size * geometry.chunk_size
    summaries = ksa_summary_attention(
        q_summary, k_text[:, :whole], v_text[:, :whole], k_summary, v_summary, geometry, **options
    )
    return torch.cat([out, summaries], dim=1)
