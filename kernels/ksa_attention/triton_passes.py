"""`forward` and `backward` of reference.py in Triton: the joint op's launches on memory of the caller's."""

from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    OutputGradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
    TextOutputs,
)
from megatron_ksa.kernels.ksa_attention.triton_common import addressable, check_rows, finite_window, row_starts
from megatron_ksa.kernels.ksa_attention.triton_config import Tiles, tile_numbers
from megatron_ksa.kernels.ksa_attention.triton_joint import launch_joint_backward, launch_joint_forward
from megatron_ksa.kernels.ksa_attention.workspace import new_dealt, new_workspace


def _prepared(rows: Rows, sizes: Sizes) -> tuple[Rows, Sizes, tuple[int, ...]]:
    """Rows that the kernels can read, sizes with a finite window, and the numbers of the tiles."""
    scale = check_rows(rows.q, rows[1:5], sizes.softmax_scale)
    last = sizes.query_start + rows.q.shape[1]
    window = finite_window(sizes.window, last, sizes.chunk_size)
    geometry = KSAGeometry(sizes.chunk_size, sizes.summary_tokens, sizes.window)
    readable = Rows(*(addressable(t) for t in rows[:5]), row_starts(rows.document_start, rows.q.shape[0]))
    return readable, sizes._replace(window=window, softmax_scale=scale), tile_numbers(rows.q, rows.k.shape[2], geometry)


def _beside(rows: Rows, sizes: Sizes, tiles: tuple[int, ...], *pairs: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernels may serve the summary queries beside the text queries (conditions: `launch_forward`).

    pairs: tensors of text and of summary queries.
    """
    if not pairs[0][1].shape[1] or any((sizes.query_start, sizes.key_start, sizes.chunk_start)):
        return False
    pairs += (rows.k, rows.k_summary), (rows.v, rows.v_summary)
    alike = all(text.stride() == summaries.stride() for text, summaries in pairs)
    return alike and Tiles.unpack(tiles).serve_summaries(sizes.chunk_size, sizes.summary_tokens)


def forward(rows: Rows, summary: SummaryForward, outputs: TextOutputs, sizes: Sizes) -> None:
    """As `reference.forward`, for bfloat16, float16 and float32; `document_start` must not decrease along a sequence.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have.
    """
    rows, sizes, tiles = _prepared(rows, sizes)
    summary = summary._replace(q=addressable(summary.q))
    beside = _beside(rows, sizes, tiles, (rows.q, summary.q), (outputs.out, summary.out))
    launch_joint_forward(rows, summary, outputs, new_dealt(rows.q.device), (sizes, tiles, beside))


def backward(
    rows: Rows, summary: SummaryBackward, outputs: TextOutputs, d_out: Tensor, gradients: Gradients, sizes: Sizes
) -> None:
    """As `reference.backward`; conditions and errors as of `forward`. Deterministic: no atomics."""
    rows, sizes, tiles = _prepared(rows, sizes)
    summary = summary._replace(q=addressable(summary.q), d_out=addressable(summary.d_out))
    d_out, outputs = addressable(d_out), outputs._replace(out=addressable(outputs.out))
    beside = _beside(
        rows, sizes, tiles, (rows.q, summary.q), (d_out, summary.d_out), (gradients.dq, summary.dq)
    )  # fmt: skip
    workspace = new_workspace(
        rows.q, rows.k, rows.k_summary, rows.document_start, outputs.lse, Tiles.unpack(tiles), beside
    )
    launch_joint_backward(
        rows, summary, outputs, OutputGradients(d_out, None), gradients, workspace, (sizes, tiles)
    )  # fmt: skip
