"""What the launches of KSA attention hand on, by name: tensors of a call, sizes, results and gradients.

All are NamedTuples, so that `launch.repeatable` sees plain tuples of tensors. Shapes are those of `reference.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Queries of one kind (text or summaries), the keys and values of both kinds, and where documents begin.

    The last dimension of every tensor is contiguous.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_summary: Tensor
    v_summary: Tensor
    document_start: Tensor | None


class Sizes(NamedTuple):
    """The geometry of a call and its place in the sequence, in the order in which the custom ops take them."""

    chunk_size: int
    summary_tokens: int
    window: int
    query_start: int
    key_start: int
    chunk_start: int
    softmax_scale: float


class TextOutputs(NamedTuple):
    """out [B, nq, Hq, D] and lse [B, Hq, nq] of the text queries; lse is contiguous."""

    out: Tensor
    lse: Tensor


class OutputGradients(NamedTuple):
    """Gradients of `TextOutputs`; d_lse is contiguous, or None where lse was not used."""

    d_out: Tensor
    d_lse: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the tensors of `Rows`; those of keys and values of one kind have equal strides."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dk_summary: Tensor
    dv_summary: Tensor


class SummaryForward(NamedTuple):
    """The summary queries of a joint call and their output, which a launch fills."""

    q: Tensor
    out: Tensor


class SummaryBackward(NamedTuple):
    """The summary queries of a joint call, the gradient of their output, and their dQ, which a launch fills."""

    q: Tensor
    d_out: Tensor
    dq: Tensor


def new_like(*rows: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised contiguous tensors of the shapes, dtypes and devices of `rows`."""
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rows)


def new_outputs(q: Tensor, text_rows: int) -> TextOutputs:
    """Uninitialised out of q's shape [B, rows, Hq, D] and lse, float32 [B, Hq, text_rows]."""
    batch, _, heads, _ = q.shape
    lse = torch.empty((batch, heads, text_rows), dtype=torch.float32, device=q.device)
    return TextOutputs(*new_like(q), lse)
