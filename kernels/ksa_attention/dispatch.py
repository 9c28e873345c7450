"""KSA attention by device (see `kernels/dispatch.py`): Triton kernels or the PyTorch reference."""

import torch
from torch import Tensor

from megatron_ksa.kernels.dispatch import uses_triton
from megatron_ksa.kernels.ksa_attention import reference
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

OP = "KSA attention"


def attention(
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

    Raises:
        UsageError: on CUDA, a dtype, head dimension or number of heads that the kernels do not have.
    """
    options = {"document_start": document_start, "softmax_scale": softmax_scale}
    if uses_triton(OP, q):
        from megatron_ksa.kernels.ksa_attention import triton_rows

        return triton_rows.attention(q, k, v, geometry, text_rows=text_rows, **options)
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary) = (
        rows.split([text_rows, rows.shape[1] - text_rows], dim=1) for rows in (q, k, v)
    )
    out, _ = reference.text_attention(q_text, k_text, v_text, k_summary, v_summary, geometry, **options)
    if not q_summary.shape[1]:
        return out
    whole = text_rows // geometry.chunk_size * geometry.chunk_size
    summaries = reference.summary_attention(
        q_summary, k_text[:, :whole], v_text[:, :whole], k_summary, v_summary, geometry, **options
    )
    return torch.cat([out, summaries], dim=1)


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    geometry: KSAGeometry,
    *,
    document_start: Tensor | None = None,
    query_start: int = 0,
    key_start: int = 0,
    chunk_start: int = 0,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of text queries; arguments and results as in `reference.text_attention`.

    Raises:
        UsageError: on CUDA, a dtype, head dimension or number of heads that the kernels do not have.
    """
    attend = reference.text_attention
    if uses_triton(OP, q):
        from megatron_ksa.kernels.ksa_attention.triton_text import text_attention as attend
    return attend(
        q, k, v, k_summary, v_summary, geometry, document_start=document_start, query_start=query_start,
        key_start=key_start, chunk_start=chunk_start, softmax_scale=softmax_scale,
    )  # fmt: skip


def summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    geometry: KSAGeometry,
    *,
    document_start: Tensor | None = None,
    key_start: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of summary queries; arguments and result as in `reference.summary_attention`.

    Raises:
        UsageError: on CUDA, a dtype, head dimension or number of heads that the kernels do not have.
    """
    attend = reference.summary_attention
    if uses_triton(OP, q):
        from megatron_ksa.kernels.ksa_attention.triton_summary import summary_attention as attend
    return attend(
        q, k, v, k_summary, v_summary, geometry, document_start=document_start, key_start=key_start,
        softmax_scale=softmax_scale,
    )  # fmt: skip
