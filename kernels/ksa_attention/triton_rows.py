"""KSA among rows laid out `[text | summaries]` as one custom op: no slice, concatenation or gradient sum is copied."""

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_backward import launch_backward
from megatron_ksa.kernels.ksa_attention.triton_common import addressable, check_rows, finite_window, row_starts
from megatron_ksa.kernels.ksa_attention.triton_config import Tiles, tile_numbers
from megatron_ksa.kernels.ksa_attention.triton_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward


def _split(text_rows: int, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the text rows and of the summary rows of each tensor."""
    return [(rows[:, :text_rows], rows[:, text_rows:]) for rows in tensors]


def _new_outputs(q: Tensor, text_rows: int) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((batch, heads, text_rows), dtype=torch.float32, device=q.device),
    )


@torch.library.custom_op("megatron_ksa::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _new_outputs(q, text_rows)
    rows = [addressable(t) for t in (q, k, v)]
    (q_text, q_own), (k_text, k_own), (v_text, v_own), (out_text, out_own) = _split(text_rows, *rows, out)
    launch_forward(
        q_text, k_text, v_text, k_own, v_own, document_start, chunk_size, summary_tokens, window, 0, 0, 0,
        softmax_scale, Tiles.unpack(tiles).forward, out_text, lse,
    )  # fmt: skip
    launch_summary_forward(
        q_own, k_text, v_text, k_own, v_own, document_start, chunk_size, summary_tokens, 0, softmax_scale, out_own
    )
    return out, lse


@_attention.register_fake
def _(q, k, v, document_start, text_rows, *settings):
    return _new_outputs(q, text_rows)


@torch.library.custom_op("megatron_ksa::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
    out: Tensor, lse: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [addressable(t) for t in (q, k, v, out, d_out)]
    gradients = _new_gradients(q, k, v)
    (q_text, q_own), (k_text, k_own), (v_text, v_own), (out_text, _), (d_out_text, d_out_own) = _split(text_rows, *rows)
    (dq_text, dq_own), (dk_text, dk_own), (dv_text, dv_own) = _split(text_rows, *gradients)
    launch_backward(
        q_text, k_text, v_text, k_own, v_own, document_start, chunk_size, summary_tokens, window, 0, 0, 0,
        softmax_scale, Tiles.unpack(tiles), out_text, lse, d_out_text, None,
        dq_text, dk_text, dv_text, dk_own, dv_own,
    )  # fmt: skip
    launch_summary_backward(
        q_own, k_text, v_text, k_own, v_own, document_start, chunk_size, summary_tokens, 0, softmax_scale, d_out_own,
        dq_own, dk_text, dv_text, dk_own, dv_own, accumulate=True,
    )  # fmt: skip
    return gradients


def _new_gradients(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rows)


@_attention_backward.register_fake
def _(q, k, v, *settings):
    return _new_gradients(q, k, v)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out: Tensor, _):
    *inputs, out, lse = ctx.saved_tensors
    gradients = torch.ops.megatron_ksa.attention_backward(*inputs, *ctx.settings, out, lse, d_out)
    return *gradients, *[None] * (1 + len(ctx.settings))


_attention.register_autograd(_backward, setup_context=_save)


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
