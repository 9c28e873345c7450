"""`text_attention` of reference.py in Triton: custom ops around the kernels, autograd, and the public function."""

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_backward import launch_backward
from megatron_ksa.kernels.ksa_attention.triton_common import addressable, check_rows, finite_window, row_starts
from megatron_ksa.kernels.ksa_attention.triton_config import Tiles, tile_numbers
from megatron_ksa.kernels.ksa_attention.triton_forward import launch_forward, new_outputs


@torch.library.custom_op("megatron_ksa::text_attention", mutates_args=())
def _text_attention(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tiles: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = new_outputs(q)
    rows = [addressable(t) for t in (q, k, v, k_summary, v_summary)]
    launch_forward(
        *rows, document_start, chunk_size, summary_tokens, window, query_start, key_start, chunk_start,
        softmax_scale, Tiles.unpack(tiles).forward, out, lse,
    )  # fmt: skip
    return out, lse


@_text_attention.register_fake
def _(q, k, v, k_summary, v_summary, document_start, *settings):
    return new_outputs(q)


@torch.library.custom_op("megatron_ksa::text_attention_backward", mutates_args=())
def _text_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, document_start: Tensor | None,
    chunk_size: int, summary_tokens: int, window: int, query_start: int, key_start: int, chunk_start: int,
    softmax_scale: float, tiles: list[int], out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [addressable(t) for t in (q, k, v, k_summary, v_summary)]
    gradients = _new_gradients(*rows)
    launch_backward(
        *rows, document_start, chunk_size, summary_tokens, window, query_start, key_start, chunk_start,
        softmax_scale, Tiles.unpack(tiles), out, lse, addressable(d_out),
        None if d_lse is None else d_lse.contiguous(), *gradients,
    )  # fmt: skip
    return gradients


def _new_gradients(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rows)


@_text_attention_backward.register_fake
def _(q, k, v, k_summary, v_summary, *settings):
    return _new_gradients(q, k, v, k_summary, v_summary)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    *inputs, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    gradients = torch.ops.megatron_ksa.text_attention_backward(*inputs, *ctx.settings, out, lse, d_out, d_lse)
    return *gradients, *[None] * (1 + len(ctx.settings))


_text_attention.register_autograd(_backward, setup_context=_save)


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
        q, *keys, row_starts(document_start, q.shape[0]), geometry.chunk_size, geometry.summary_tokens,
        window, query_start, key_start, chunk_start, scale, numbers,
    )  # fmt: skip
