"""Norm and rotation of query and key heads by Triton kernels: launches, custom ops, autograd, public function."""

import torch
import triton
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.column_sums import column_sums
from megatron_ksa.kernels.differentiable import differentiable
from megatron_ksa.kernels.launch import launch, repeatable
from megatron_ksa.kernels.rotation.triton_kernels import rotate_backward_kernel, rotate_forward_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
# Programs of the backward pass. Each writes its own part of the weights' gradients, [2, D] in float32, which is small
# beside the heads that it reads if it has 18 tiles of rows; 1024 programs at least are several for each multiprocessor
# of a large GPU. The number does not depend on the GPU, and so neither does the order of the sums.
FEWEST_PROGRAMS, MOST_PROGRAMS = 1024, 8192
TILES_OF_A_PROGRAM = 18
WARPS = 4
# Elements of half a head in a tile: 8 for each thread of WARPS warps.
TILE_ELEMENTS = 1024


def _block_rows(dim: int, half: int) -> int:
    """Rows of a tile, for heads of dim channels of which 2 * half are rotated."""
    widest = max(triton.next_power_of_2(half), triton.next_power_of_2(max(dim - 2 * half, 1)) // 2)
    return max(TILE_ELEMENTS // widest, 1)


def _sizes(mixed: Tensor, queries: int, frequencies: Tensor, interleaved: bool) -> dict[str, int]:
    """Compile-time sizes of the kernels."""
    half, dim = frequencies.shape[1], mixed.shape[-1] // (queries + 2)
    return {
        "QUERIES": queries, "HALF": half, "PASS": dim - 2 * half, "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_PASS": triton.next_power_of_2(max(dim - 2 * half, 1)), "BLOCK_DIM": triton.next_power_of_2(dim),
        "BLOCK_ROWS": _block_rows(dim, half), "INTERLEAVED": interleaved, "num_warps": WARPS,
    }  # fmt: skip


def _strides(*tensors: Tensor, count: int = 3) -> list[int]:
    """The first strides of each tensor: of rows, batch, and heads or groups."""
    return [stride for rows in tensors for stride in rows.stride()[:count]]


def _shared_strides(positions: Tensor, frequencies: Tensor) -> tuple[int, int, int]:
    """Strides of positions and frequencies, 0 where one entry serves all."""
    return (
        positions.stride(0), positions.stride(1) if positions.shape[1] > 1 else 0,
        frequencies.stride(0) if frequencies.shape[0] > 1 else 0,
    )  # fmt: skip


@repeatable
def _launch_forward(tensors: tuple[Tensor, ...], settings: tuple[int, float, bool, bool]) -> None:
    """Write query, key and value of one part of the rows.

    tensors: positions, frequencies, mixed heads, query, key, value, and the weights of query and key or none.
    """
    positions, frequencies, mixed, query, key, value, *weights = tensors
    queries, eps, zero_centered, interleaved = settings
    rows, batch, groups, _ = mixed.shape
    sizes = _sizes(mixed, queries, frequencies, interleaved)
    launch(
        rotate_forward_kernel, (groups * triton.cdiv(rows, sizes["BLOCK_ROWS"]), batch),
        mixed, *(weights or (mixed, mixed)), positions, frequencies, query, key, value,
        rows, groups, *_shared_strides(positions, frequencies), *_strides(mixed), *_strides(query, key, count=2), eps,
        NORM=bool(weights), ZERO_CENTERED=zero_centered, **sizes,
    )  # fmt: skip


def _backward_programs(mixed: Tensor, block_rows: int) -> tuple[int, int, int]:
    """Tiles of rows, tiles of a program, and programs for each sample, for mixed heads [rows, batch, groups, ...]."""
    rows, batch, groups, _ = mixed.shape
    tiles = triton.cdiv(rows, block_rows)
    all_tiles = tiles * groups * batch
    programs = min(max(all_tiles // TILES_OF_A_PROGRAM, FEWEST_PROGRAMS), MOST_PROGRAMS)
    tiles_per_program = triton.cdiv(all_tiles, programs)
    return tiles, tiles_per_program, groups * triton.cdiv(tiles, tiles_per_program)


@repeatable
def _launch_backward(tensors: tuple[Tensor | None, ...], settings: tuple[int, float, bool, bool]) -> None:
    """Write the gradient of one part's mixed heads, and each program's part of those of the weights.

    tensors: positions, frequencies, the gradients of query, key, value and mixed heads, the weights' gradients by
    program (None without a norm), then with a norm the mixed heads and the weights of query and key.
    """
    positions, frequencies, d_query, d_key, d_value, d_mixed, d_gain, *normalised = tensors
    queries, eps, zero_centered, interleaved = settings
    mixed, *weights = normalised or [d_mixed] * 3
    rows, batch, groups, _ = d_mixed.shape
    sizes = _sizes(d_mixed, queries, frequencies, interleaved)
    tiles, tiles_per_program, programs = _backward_programs(d_mixed, sizes["BLOCK_ROWS"])
    launch(
        rotate_backward_kernel, (programs, batch),
        mixed, *weights, positions, frequencies, d_query, d_key, d_value, d_mixed, d_gain,
        rows, groups, tiles, tiles_per_program, *_shared_strides(positions, frequencies),
        *_strides(mixed, d_query, d_key, d_value, d_mixed), eps,
        NORM=bool(normalised), ZERO_CENTERED=zero_centered, **sizes,
    )  # fmt: skip


def _unit_stride(rows: Tensor) -> Tensor:
    """`rows`, copied only where neighbouring channels are not neighbours in memory."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _parts(
    text: Tensor | None, summaries: Tensor | None, weights: tuple[Tensor | None, ...]
) -> list[tuple[slice, Tensor, list[Tensor]]]:
    """Place among the rows, heads, and weights of query and key (or none) of each part that has rows."""
    parts, start = [], 0
    for mixed, pair in ((text, weights[:2]), (summaries, weights[2:])):
        if mixed is not None and mixed.shape[0]:
            parts.append((slice(start, start + mixed.shape[0]), mixed, [w for w in pair if w is not None]))
            start += mixed.shape[0]
    return parts


def _forward(
    text: Tensor, summaries: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_weight_summary: Tensor | None, k_weight_summary: Tensor | None, positions: Tensor, frequencies: Tensor,
    queries: int, eps: float, zero_centered: bool, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = _new_heads(text, summaries, queries)
    weights = (q_weight, k_weight, q_weight_summary, k_weight_summary)
    parts = _parts(text, summaries, weights)
    for place, mixed, pair in parts:
        # A part that is everything needs no slices, which cost the host as much as a launch.
        heads = out if len(parts) == 1 else [rows[place] for rows in out]
        where = positions if len(parts) == 1 else positions[place]
        _launch_forward(
            (where, frequencies, _unit_stride(mixed), *heads, *pair), (queries, eps, zero_centered, interleaved)
        )
    return out


def _new_heads(text: Tensor, summaries: Tensor | None, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised query, key and value of all rows."""
    rows, batch, groups, width = text.shape
    rows += 0 if summaries is None else summaries.shape[0]
    dim, options = width // (queries + 2), {"dtype": text.dtype, "device": text.device}
    key, value = (torch.empty((rows, batch, groups, dim), **options) for _ in range(2))
    return torch.empty((rows, batch, groups * queries, dim), **options), key, value


def _backward(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, text: Tensor | None, summaries: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_weight_summary: Tensor | None,
    k_weight_summary: Tensor | None, positions: Tensor, frequencies: Tensor, text_rows: int, queries: int, eps: float,
    zero_centered: bool, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the mixed heads of text and summaries, and of the weights of query and key of both, [2, D].

    With norm weights, text and summaries must be given; without, the gradients of the weights have no elements.
    """
    d_out = [_unit_stride(rows) for rows in (d_query, d_key, d_value)]
    d_parts, d_pairs, start = [], [], 0
    for mixed, rows, pair in (
        (text, text_rows, (q_weight, k_weight)),
        (summaries, d_key.shape[0] - text_rows, (q_weight_summary, k_weight_summary)),
    ):
        d_mixed = _new_mixed(d_key, rows, queries)
        normalised, d_gain = (), None
        if pair[0] is not None:
            normalised, d_gain = (_unit_stride(mixed), *pair), _new_gain_parts(d_mixed, d_key.shape[-1], frequencies)
        if rows:
            place = slice(start, start + rows)
            _launch_backward(
                (positions[place], frequencies, *(d[place] for d in d_out), d_mixed, d_gain, *normalised),
                (queries, eps, zero_centered, interleaved),
            )
        d_parts.append(d_mixed)
        d_pairs.append(_new_pair(d_key, None) if d_gain is None else column_sums(d_gain, pair[0].dtype))
        start += rows
    return *d_parts, *d_pairs


def _new_mixed(d_key: Tensor, rows: int, queries: int) -> Tensor:
    _, batch, groups, dim = d_key.shape
    return torch.empty((rows, batch, groups, (queries + 2) * dim), dtype=d_key.dtype, device=d_key.device)


def _new_pair(d_key: Tensor, weight: Tensor | None) -> Tensor:
    shape, dtype = ((0,), d_key.dtype) if weight is None else ((2, d_key.shape[-1]), weight.dtype)
    return torch.empty(shape, dtype=dtype, device=d_key.device)


def _new_gain_parts(d_mixed: Tensor, dim: int, frequencies: Tensor) -> Tensor:
    """Uninitialised float32 [programs, 2, D]: the gradients of the weights of query and key by program."""
    programs = _backward_programs(d_mixed, _block_rows(dim, frequencies.shape[1]))[2] if len(d_mixed) else 0
    return torch.empty((d_mixed.shape[1] * programs, 2, dim), dtype=torch.float32, device=d_mixed.device)


def _save(ctx, inputs, output) -> None:
    text, summaries, *weights, positions, frequencies, queries, eps, zero_centered, interleaved = inputs
    # A rotation alone needs no heads in its backward pass.
    kept = (text if weights[0] is not None else None, summaries if weights[2] is not None else None)
    ctx.save_for_backward(*kept, *weights, positions, frequencies)
    ctx.settings = (text.shape[0], queries, eps, zero_centered, interleaved)
    ctx.has_summaries = summaries is not None


def _gradients(ctx, backward, d_query: Tensor, d_key: Tensor, d_value: Tensor):
    d_text, d_summaries, *d_pairs = backward(d_query, d_key, d_value, *ctx.saved_tensors, *ctx.settings)
    weights = ctx.saved_tensors[2:6]
    d_weights = [
        d_weight
        for pair, weight in zip(d_pairs, weights[::2], strict=True)
        for d_weight in ((None, None) if weight is None else pair.unbind())
    ]
    return d_text, d_summaries if ctx.has_summaries else None, *d_weights, *[None] * 6


def _fake_backward(
    dq, d_key, dv, text, summaries, q_weight, kw, q_weight_summary, skw, positions, frequencies, rows, queries, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mixed = (_new_mixed(d_key, count, queries) for count in (rows, d_key.shape[0] - rows))
    return *mixed, _new_pair(d_key, q_weight), _new_pair(d_key, q_weight_summary)


_rotate = differentiable(
    "rotate", _forward, _backward, save=_save, gradients=_gradients, fake_backward=_fake_backward,
    fake=lambda text, summaries, *inputs: _new_heads(text, summaries, inputs[6]),
)  # fmt: skip


def _check(parts: list[Tensor], queries: int, positions: Tensor, frequencies: Tensor) -> None:
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or parts[0].dtype not in DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        raise UsageError(f"rotation got dtypes {names}: one of bfloat16, float16 or float32 for all is needed")
    _, batch, groups, width = parts[0].shape
    dim, ragged = divmod(width, queries + 2)
    if ragged:
        raise UsageError(f"{width} channels of a K/V group do not divide into {queries} query heads, a key and a value")
    if not 0 < 2 * frequencies.shape[1] <= dim <= LARGEST_HEAD_DIM:
        raise UsageError(
            f"{2 * frequencies.shape[1]} rotated channels of head_dim {dim}: the rotation kernel takes 2 to head_dim "
            f"of at most {LARGEST_HEAD_DIM}; set --rotary-percent or --kv-channels"
        )
    if frequencies.shape[0] not in (1, groups):
        raise UsageError(
            f"frequencies of {frequencies.shape[0]} groups do not fit {groups} K/V heads: one row for each or for all "
            "of them is needed"
        )
    rows = sum(part.shape[0] for part in parts)
    if positions.shape[0] != rows or positions.shape[1] not in (1, batch):
        raise UsageError(f"positions {tuple(positions.shape)} do not fit {rows} rows of batch {batch}")


def rotate(
    parts: list[Tensor],
    queries: int,
    weights: list[tuple[Tensor, Tensor] | None],
    positions: Tensor,
    frequencies: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `reference.rotate`, for one or two parts; sums and products are float32.

    Deterministic.

    Raises:
        UsageError: dtypes, head dimension, numbers of heads or positions that the kernels do not take.
    """
    _check(parts, queries, positions, frequencies)
    text, summaries = parts if len(parts) == 2 else (*parts, None)
    pairs = [weight for pair in (*weights, None)[:2] for weight in (pair or (None, None))]
    return _rotate(
        text, summaries, *pairs, positions, _unit_stride(frequencies), queries, eps, zero_centered, interleaved
    )
