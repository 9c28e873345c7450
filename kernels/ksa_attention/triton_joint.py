"""The joint op: KSA among rows laid out `[text | summaries]`, text and summary queries in one custom op.

One op and not two, so that no slice, concatenation or gradient sum of the rows is copied.
"""

from torch import Tensor

from megatron_ksa.kernels.differentiable import differentiable
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    OutputGradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
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
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward
from megatron_ksa.kernels.ksa_attention.triton_text_backward import launch_backward
from megatron_ksa.kernels.ksa_attention.triton_text_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, new_dealt, new_workspace
from megatron_ksa.kernels.launch import repeatable


def _split(text_rows: int, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the text rows and of the summary rows of each tensor."""
    return [(rows[:, :text_rows], rows[:, text_rows:]) for rows in tensors]


@repeatable
def launch_joint_forward(
    rows: Rows, summary: SummaryForward, outputs: TextOutputs, dealt: tuple[Tensor], settings: tuple
) -> None:
    """Fill the outputs of both kinds of queries.

    rows: with the text queries. settings: Sizes, the numbers of `Tiles.pack`, and whether the kernels serve the summary
    queries beside the text queries (conditions: `launch_forward`).
    """
    sizes, tiles, beside = settings[0], Tiles.unpack(settings[1]), settings[2]
    launch_forward(rows, sizes, tiles.forward, outputs, *dealt, summary if beside else None)
    if not beside:
        launch_summary_forward(rows._replace(q=summary.q), sizes, summary.out)


@repeatable
def launch_joint_backward(
    rows: Rows, summary: SummaryBackward, outputs: TextOutputs, d_outputs: OutputGradients, gradients: Gradients,
    workspace: Workspace, settings: tuple,
) -> None:  # fmt: skip
    """Fill `gradients`, with dQ of the text queries, and dQ of the summary queries.

    The kernels serve the summary queries beside the text queries where the workspace has statistics of these.
    settings: Sizes, and the numbers of `Tiles.pack`.
    """
    sizes, tiles = settings[0], Tiles.unpack(settings[1])
    beside = workspace.summary_lse2 is not None
    launch_backward(rows, sizes, tiles, outputs, d_outputs, gradients, workspace, summary if beside else None)
    if not beside:
        launch_summary_backward(
            rows._replace(q=summary.q), sizes, summary.d_out, gradients._replace(dq=summary.dq), accumulate=True
        )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = new_outputs(q, text_rows)
    rows = [addressable(t) for t in (q, k, v)]
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary), (out_text, out_summary) = _split(
        text_rows, *rows, out
    )
    beside = q_summary.shape[1] > 0 and Tiles.unpack(tiles).serve_summaries(chunk_size, summary_tokens)
    launch_joint_forward(
        Rows(q_text, k_text, v_text, k_summary, v_summary, document_start), SummaryForward(q_summary, out_summary),
        TextOutputs(out_text, lse), new_dealt(q.device),
        (Sizes(chunk_size, summary_tokens, window, 0, 0, 0, softmax_scale), tuple(tiles), beside),
    )  # fmt: skip
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, text_rows: int,
    chunk_size: int, summary_tokens: int, window: int, softmax_scale: float, tiles: list[int],
    out: Tensor, lse: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [addressable(t) for t in (q, k, v, out, d_out)]
    gradients = new_like(q, k, v)
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary), (out_text, _), (d_out_text, d_out_summary) = _split(
        text_rows, *rows
    )
    (dq_text, dq_summary), (dk_text, dk_summary), (dv_text, dv_summary) = _split(text_rows, *gradients)
    named = Tiles.unpack(tiles)
    beside = q_summary.shape[1] > 0 and named.serve_summaries(chunk_size, summary_tokens)
    launch_joint_backward(
        Rows(q_text, k_text, v_text, k_summary, v_summary, document_start),
        SummaryBackward(q_summary, d_out_summary, dq_summary),
        TextOutputs(out_text, lse), OutputGradients(d_out_text, None),
        Gradients(dq_text, dk_text, dv_text, dk_summary, dv_summary),
        new_workspace(q_text, k_text, k_summary, document_start, lse, named, beside),
        (Sizes(chunk_size, summary_tokens, window, 0, 0, 0, softmax_scale), tuple(tiles)),
    )  # fmt: skip
    return gradients


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    # Otherwise the log-sum-exp, which has no gradient, would get zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, d_out: Tensor, _):
    *inputs, out, lse = ctx.saved_tensors
    gradients = backward(*inputs, *ctx.settings, out, lse, d_out)
    return *gradients, *[None] * (1 + len(ctx.settings))


_attention = differentiable(
    "attention", _forward, _backward, save=_save, gradients=_gradients,
    fake=lambda q, k, v, document_start, text_rows, *settings: tuple(new_outputs(q, text_rows)),
    fake_backward=lambda *inputs: new_like(*inputs[:3]),
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
    """KSA among rows laid out `[text | summaries]`; arguments and result as in `reference.attention`.

    For bfloat16, float16 and float32; `document_start` must not decrease along a sequence. Gradients are
    deterministic: no atomics. The log-sum-exp is not returned: `triton_text.text_attention` does that.

    Args:
        tiles: tile shapes of the kernels; by default those stored for the head dimension and dtype.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have.
    """
    scale = check_rows(q, (k, v), softmax_scale)
    window = finite_window(geometry.window_chunks, text_rows, geometry.chunk_size)
    numbers = tiles.pack() if tiles else tile_numbers(q, k.shape[2], geometry)
    out, _ = _attention(
        q, k, v, row_starts(document_start, q.shape[0]), text_rows, geometry.chunk_size,
        summary_divisor(geometry, q.shape[1] - text_rows), window, scale, numbers,
    )  # fmt: skip
    return out
