"""`text_attention` of reference.py in Triton: custom ops around the kernels, autograd, and the public function."""

import torch
from torch import Tensor

from megatron_ksa.kernels.differentiable import differentiable
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    OutputGradients,
    Rows,
    Sizes,
    TextOutputs,
    new_like,
    new_outputs,
)
from megatron_ksa.kernels.ksa_attention.triton_common import (
    addressable,
    check_rows,
    finite_window,
    row_starts,
    summary_divisor,
)
from megatron_ksa.kernels.ksa_attention.triton_config import Tiles, tile_numbers
from megatron_ksa.kernels.ksa_attention.triton_text_backward import launch_backward
from megatron_ksa.kernels.ksa_attention.triton_text_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, new_dealt, new_workspace
from megatron_ksa.kernels.launch import repeatable


@repeatable
def _launch_forward(rows: Rows, outputs: TextOutputs, dealt: tuple[Tensor], settings: tuple) -> None:
    """settings: Sizes, and the numbers of `Tiles.pack`."""
    sizes, tiles = settings
    launch_forward(rows, sizes, Tiles.unpack(tiles).forward, outputs, *dealt)


@repeatable
def _launch_backward(
    rows: Rows, outputs: TextOutputs, d_outputs: OutputGradients, gradients: Gradients, workspace: Workspace,
    settings: tuple,
) -> None:  # fmt: skip
    """settings: as in `_launch_forward`."""
    sizes, tiles = settings
    launch_backward(rows, sizes, Tiles.unpack(tiles), outputs, d_outputs, gradients, workspace)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tiles: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = new_outputs(q, q.shape[1])
    rows = Rows(*(addressable(t) for t in (q, k, v, k_summary, v_summary)), document_start)
    sizes = Sizes(chunk_size, summary_tokens, window, query_start, key_start, chunk_start, softmax_scale)
    _launch_forward(rows, outputs, new_dealt(q.device), (sizes, tuple(tiles)))
    return tuple(outputs)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tiles: list[int], out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(*(addressable(t) for t in (q, k, v, k_summary, v_summary)), document_start)
    sizes = Sizes(chunk_size, summary_tokens, window, query_start, key_start, chunk_start, softmax_scale)
    gradients = Gradients(*new_like(*rows[:5]))
    d_outputs = OutputGradients(addressable(d_out), None if d_lse is None else d_lse.contiguous())
    workspace = new_workspace(rows.q, rows.k, rows.k_summary, document_start, lse, Tiles.unpack(tiles))
    _launch_backward(rows, TextOutputs(out, lse), d_outputs, gradients, workspace, (sizes, tuple(tiles)))
    return tuple(gradients)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, d_out: Tensor | None, d_lse: Tensor | None):
    *inputs, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    gradients = backward(*inputs, *ctx.settings, out, lse, d_out, d_lse)
    return *gradients, *[None] * (1 + len(ctx.settings))


_text_attention = differentiable(
    "text_attention", _forward, _backward, save=_save, gradients=_gradients,
    fake=lambda q, *rest: tuple(new_outputs(q, q.shape[1])), fake_backward=lambda *inputs: new_like(*inputs[:5]),
)  # fmt: skip


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
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of text queries over the text in their window and the summaries of older chunks.

    Arguments and results as in `reference.text_attention`, for bfloat16, float16 and float32; `document_start` must
    not decrease along a sequence. Gradients are deterministic: no atomics.

    Args:
        tiles: tile shapes of the kernels; by default those stored for the head dimension and dtype.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have.
    """
    keys = (k, v, k_summary, v_summary)
    scale = check_rows(q, keys, softmax_scale)
    window = finite_window(geometry.window_chunks, query_start + q.shape[1], geometry.chunk_size)
    numbers = tiles.pack() if tiles else tile_numbers(q, k.shape[2], geometry)
    return _text_attention(
        q, *keys, row_starts(document_start, q.shape[0]), geometry.chunk_size,
        summary_divisor(geometry, k_summary.shape[1]), window, query_start, key_start, chunk_start, scale, numbers,
    )  # fmt: skip
