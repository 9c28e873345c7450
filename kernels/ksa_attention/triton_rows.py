"""KSA among rows laid out `[text | summaries]` as one custom op: no slice, concatenation or gradient sum is copied."""

import torch
from torch import Tensor

from megatron_ksa.kernels.differentiable import differentiable
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_backward import launch_backward
from megatron_ksa.kernels.ksa_attention.triton_common import addressable, check_rows, finite_window, row_starts
from megatron_ksa.kernels.ksa_attention.triton_config import Tiles, tile_numbers
from megatron_ksa.kernels.ksa_attention.triton_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, new_dealt, new_workspace
from megatron_ksa.kernels.launch import repeatable


def _split(text_rows: int, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the text rows and of the summary rows of each tensor."""
    return [(rows[:, :text_rows], rows[:, text_rows:]) for rows in tensors]


def _new_outputs(q: Tensor, text_rows: int) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((batch, heads, text_rows), dtype=torch.float32, device=q.device),
    )


@repeatable
def _launch_forward(tensors: tuple[Tensor | None, ...], settings: tuple) -> None:
    """tensors: q, k and v of the text, k and v of the summaries, document_start, their q; outputs; a counter."""
    *keys, document_start, q_own, out, out_own, lse, dealt = tensors
    chunk_size, summary_tokens, window, scale, tiles = settings
    tiles = Tiles.unpack(tiles)
    own = (q_own, out_own) if q_own.shape[1] and tiles.serve_summaries(chunk_size, summary_tokens) else None
    launch_forward(
        *keys, document_start, chunk_size, summary_tokens, window, 0, 0, 0, scale, tiles.forward, out, lse, dealt, own
    )  # fmt: skip
    if own is None:
        launch_summary_forward(q_own, *keys[1:], document_start, chunk_size, summary_tokens, 0, scale, out_own)


@repeatable
def _launch_backward(tensors: tuple[Tensor | None, ...], settings: tuple) -> None:
    """tensors: as in the forward pass up to q of the summaries; out, lse, d_out, gradients, workspace."""
    rows, q_own, (out, lse, d_out, d_out_own) = tensors[:6], tensors[6], tensors[7:11]
    dq, dk, dv, dk_own, dv_own, dq_own = tensors[11:17]
    chunk_size, summary_tokens, window, scale, tiles = settings
    workspace = Workspace.unpack(tensors[17:])
    own = (q_own, d_out_own, dq_own) if workspace.own_statistics else None
    launch_backward(
        *rows, chunk_size, summary_tokens, window, 0, 0, 0, scale, Tiles.unpack(tiles), out, lse, d_out, None,
        dq, dk, dv, dk_own, dv_own, workspace, own,
    )  # fmt: skip
    if own is None:
        launch_summary_backward(
            q_own, *rows[1:], chunk_size, summary_tokens, 0, scale, d_out_own, dq_own, dk, dv, dk_own, dv_own,
            accumulate=True,
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _new_outputs(q, text_rows)
    rows = [addressable(t) for t in (q, k, v)]
    (q_text, q_own), (k_text, k_own), (v_text, v_own), (out_text, out_own) = _split(text_rows, *rows, out)
    _launch_forward(
        (q_text, k_text, v_text, k_own, v_own, document_start, q_own, out_text, out_own, lse, *new_dealt(q.device)),
        (chunk_size, summary_tokens, window, softmax_scale, tuple(tiles)),
    )
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
    out: Tensor, lse: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [addressable(t) for t in (q, k, v, out, d_out)]
    gradients = _new_gradients(q, k, v)
    (q_text, q_own), (k_text, k_own), (v_text, v_own), (out_text, _), (d_out_text, d_out_own) = _split(text_rows, *rows)
    (dq_text, dq_own), (dk_text, dk_own), (dv_text, dv_own) = _split(text_rows, *gradients)
    named = Tiles.unpack(tiles)
    own = q_own.shape[1] > 0 and named.serve_summaries(chunk_size, summary_tokens)
    workspace = new_workspace(q_text, k_text, k_own, document_start, lse, named, own)
    _launch_backward(
        (
            q_text, k_text, v_text, k_own, v_own, document_start, q_own, out_text, lse, d_out_text, d_out_own,
            dq_text, dk_text, dv_text, dk_own, dv_own, dq_own, *workspace.pack(),
        ),
        (chunk_size, summary_tokens, window, softmax_scale, tuple(tiles)),
    )  # fmt: skip
    return gradients


def _new_gradients(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rows)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, backward, d_out: Tensor, _):
    *inputs, out, lse = ctx.saved_tensors
    gradients = backward(*inputs, *ctx.settings, out, lse, d_out)
    return *gradients, *[None] * (1 + len(ctx.settings))


_attention = differentiable(
    "attention", _forward, _backward, save=_save, gradients=_gradients,
    fake=lambda q, k, v, document_start, text_rows, *settings: _new_outputs(q, text_rows),
    fake_backward=lambda *inputs: _new_gradients(*inputs[:3]),
)  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: KSAGeometry,
    *,
    text_rows: int,
    document_start: Tensor | None = None,
    softmax_scale: float | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """KSA among rows laid out `[text | summaries]`; arguments and result as in `ksa_attention`.

    The log-sum-exp is not returned; partial results are merged with `triton_text.text_attention`. Deterministic.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have.
    """
    scale = check_rows(q, (k, v), softmax_scale)
    window = finite_window(geometry.window_chunks, text_rows, geometry.chunk_size)
    numbers = tiles.pack() if tiles else tile_numbers(q, k.shape[2], geometry)
    out, _ = _attention(
        q, k, v, row_starts(document_start, q.shape[0]), text_rows, geometry.chunk_size, geometry.summary_tokens,
        window, scale, numbers,
    )  # fmt: skip
    return out
