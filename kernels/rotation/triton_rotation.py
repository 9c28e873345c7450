"""Norm and rotation of query and key heads by Triton kernels: launchers, custom ops, autograd, public function."""

import torch
import triton
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.rotation.triton_kernels import rotate_backward_kernel, rotate_forward_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
# Programs of the backward pass: several for each multiprocessor of a large GPU, few enough that their parts of the
# gains' gradients are small. A constant, so that the order of sums does not depend on the GPU.
PROGRAMS = 2048
WARPS = 4
# Elements of half a head in a tile: 8 for each thread of WARPS warps.
TILE_ELEMENTS = 1024


def _sizes(query: Tensor, key: Tensor, frequencies: Tensor, interleaved: bool) -> dict[str, int]:
    """Compile-time sizes of the kernels."""
    half, dim = frequencies.shape[1], query.shape[-1]
    block_half, block_pass = triton.next_power_of_2(half), triton.next_power_of_2(max(dim - 2 * half, 1))
    return {
        "QUERIES": query.shape[2] // key.shape[2], "HALF": half, "PASS": dim - 2 * half, "BLOCK_HALF": block_half,
        "BLOCK_PASS": block_pass, "BLOCK_ROWS": max(TILE_ELEMENTS // max(block_half, block_pass // 2), 1),
        "INTERLEAVED": interleaved, "num_warps": WARPS,
    }  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Row, batch and head strides of [rows, batch, heads, D] tensors."""
    return [stride for rows in tensors for stride in rows.stride()[:3]]


def _shared_strides(positions: Tensor, frequencies: Tensor) -> tuple[int, int, int]:
    """Strides of positions and frequencies, 0 where one entry serves all."""
    return (
        positions.stride(0), positions.stride(1) if positions.shape[1] > 1 else 0,
        frequencies.stride(0) if frequencies.shape[0] > 1 else 0,
    )  # fmt: skip


def launch_forward(
    query: Tensor, key: Tensor, weights: list[Tensor], positions: Tensor, frequencies: Tensor, eps: float,
    zero_centered: bool, interleaved: bool, query_out: Tensor, key_out: Tensor,
) -> None:  # fmt: skip
    """Write the rotated heads of one part; `weights` is empty or those of queries and keys."""
    rows, batch, groups, _ = key.shape
    if not key.numel():
        return
    sizes = _sizes(query, key, frequencies, interleaved)
    grid = (groups * triton.cdiv(rows, sizes["BLOCK_ROWS"]), batch)
    rotate_forward_kernel[grid](
        query, key, *(weights or (query, key)), positions, frequencies, query_out, key_out,
        rows, groups, *_shared_strides(positions, frequencies), *_strides(query, key, query_out, key_out), eps,
        NORM=bool(weights), ZERO_CENTERED=zero_centered, **sizes,
    )  # fmt: skip


def launch_backward(
    query: Tensor, key: Tensor, weights: list[Tensor], positions: Tensor, frequencies: Tensor, eps: float,
    zero_centered: bool, interleaved: bool, d_query_out: Tensor, d_key_out: Tensor, d_query: Tensor, d_key: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Write the gradients of one part's heads; return those of its weights. Without weights heads are not read."""
    rows, batch, groups, dim = key.shape
    if not key.numel():
        return [torch.zeros_like(weight) for weight in weights]
    sizes = _sizes(query, key, frequencies, interleaved)
    tiles = triton.cdiv(rows, sizes["BLOCK_ROWS"])
    tiles_per_program = triton.cdiv(tiles * groups * batch, PROGRAMS)
    programs = groups * triton.cdiv(tiles, tiles_per_program)
    shape = (batch * programs, 2, dim) if weights else (0,)
    d_gain = torch.empty(shape, dtype=torch.float32, device=query.device)
    rotate_backward_kernel[programs, batch](
        query, key, *(weights or (query, key)), positions, frequencies, d_query_out, d_key_out, d_query, d_key, d_gain,
        rows, groups, tiles, tiles_per_program, *_shared_strides(positions, frequencies),
        *_strides(query, key, d_query_out, d_key_out, d_query, d_key), eps,
        NORM=bool(weights), ZERO_CENTERED=zero_centered, **sizes,
    )  # fmt: skip
    if not weights:
        return []
    return [part.sum(0).to(weight.dtype) for part, weight in zip(d_gain.unbind(1), weights, strict=True)]


def _unit_stride(rows: Tensor) -> Tensor:
    """`rows`, copied only where neighbouring channels are not neighbours in memory."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _by_part(weights: list[Tensor], normalized: list[bool]) -> list[list[Tensor]]:
    """The pair of weights of each part, empty where it is not normalised."""
    pairs = iter(zip(weights[::2], weights[1::2], strict=True))
    return [list(next(pairs)) if has_norm else [] for has_norm in normalized]


def _new_rows(parts: list[Tensor]) -> Tensor:
    rows, (_, *shape) = sum(part.shape[0] for part in parts), parts[0].shape
    return torch.empty((rows, *shape), dtype=parts[0].dtype, device=parts[0].device)


@torch.library.custom_op("megatron_ksa::rotate", mutates_args=())
def _rotate(
    queries: list[Tensor], keys: list[Tensor], weights: list[Tensor], positions: Tensor, frequencies: Tensor,
    normalized: list[bool], eps: float, zero_centered: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query_out, key_out = _new_rows(queries), _new_rows(keys)
    start = 0
    for query, key, pair in zip(queries, keys, _by_part(weights, normalized), strict=True):
        part = slice(start, start + query.shape[0])
        launch_forward(
            _unit_stride(query), _unit_stride(key), pair, positions[part], frequencies, eps, zero_centered, interleaved,
            query_out[part], key_out[part],
        )  # fmt: skip
        start = part.stop
    return query_out, key_out


@_rotate.register_fake
def _(queries, keys, *settings):
    return _new_rows(queries), _new_rows(keys)


@torch.library.custom_op("megatron_ksa::rotate_backward", mutates_args=())
def _rotate_backward(
    d_query_out: Tensor, d_key_out: Tensor, queries: list[Tensor], keys: list[Tensor], weights: list[Tensor],
    positions: Tensor, frequencies: Tensor, normalized: list[bool], rows: list[int], eps: float, zero_centered: bool,
    interleaved: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    d_query_out, d_key_out = _unit_stride(d_query_out), _unit_stride(d_key_out)
    heads = iter(zip(queries, keys, strict=True))
    d_queries, d_keys, d_weights, start = [], [], [], 0
    for pair, count in zip(_by_part(weights, normalized), rows, strict=True):
        part = slice(start, start + count)
        d_out = (d_query_out[part], d_key_out[part])
        query, key = (_unit_stride(head) for head in next(heads)) if pair else d_out
        d_heads = [torch.empty(d.shape, dtype=d.dtype, device=d.device) for d in d_out]
        d_weights += launch_backward(
            query, key, pair, positions[part], frequencies, eps, zero_centered, interleaved, *d_out, *d_heads
        )
        d_queries.append(d_heads[0])
        d_keys.append(d_heads[1])
        start = part.stop
    return d_queries, d_keys, d_weights


@_rotate_backward.register_fake
def _(d_query_out, d_key_out, queries, keys, weights, positions, frequencies, normalized, rows, *settings):
    parts = [[d_out.new_empty((count, *d_out.shape[1:])) for count in rows] for d_out in (d_query_out, d_key_out)]
    return parts[0], parts[1], [torch.empty_like(weight) for weight in weights]


def _save(ctx, inputs, output) -> None:
    queries, keys, weights, positions, frequencies, normalized, *settings = inputs
    # A rotation alone needs no heads in its backward pass.
    kept = [[part for part, norm in zip(parts, normalized, strict=True) if norm] for parts in (queries, keys)]
    ctx.save_for_backward(*kept[0], *kept[1], *weights, positions, frequencies)
    ctx.normalized, ctx.rows, ctx.settings = normalized, [part.shape[0] for part in queries], settings


def _backward(ctx, d_query_out: Tensor, d_key_out: Tensor):
    *saved, positions, frequencies = ctx.saved_tensors
    count = sum(ctx.normalized)
    d_queries, d_keys, d_weights = torch.ops.megatron_ksa.rotate_backward(
        d_query_out, d_key_out, saved[:count], saved[count : 2 * count], saved[2 * count :], positions, frequencies,
        ctx.normalized, ctx.rows, *ctx.settings,
    )  # fmt: skip
    return d_queries, d_keys, d_weights, None, None, None, *[None] * len(ctx.settings)


_rotate.register_autograd(_backward, setup_context=_save)


def _check(queries: list[Tensor], keys: list[Tensor], positions: Tensor, frequencies: Tensor) -> None:
    dtypes = {part.dtype for part in (*queries, *keys)}
    if len(dtypes) > 1 or queries[0].dtype not in DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        raise UsageError(f"rotation got dtypes {names}: one of bfloat16, float16 or float32 for all is needed")
    dim, heads, groups = queries[0].shape[-1], queries[0].shape[2], keys[0].shape[2]
    if not 0 < 2 * frequencies.shape[1] <= dim <= LARGEST_HEAD_DIM:
        raise UsageError(
            f"{2 * frequencies.shape[1]} rotated channels of head_dim {dim}: the rotation kernel takes 2 to head_dim "
            f"of at most {LARGEST_HEAD_DIM}; set --rotary-percent or --kv-channels"
        )
    if heads % groups or frequencies.shape[0] not in (1, groups):
        raise UsageError(
            f"{heads} query heads, {groups} K/V heads and frequencies of {frequencies.shape[0]} groups do not fit: "
            "query heads must divide into K/V heads, with one row of frequencies for each or for all of them"
        )
    rows = sum(part.shape[0] for part in queries)
    if positions.shape[0] != rows or positions.shape[1] not in (1, queries[0].shape[1]):
        raise UsageError(f"positions {tuple(positions.shape)} do not fit {rows} rows of batch {queries[0].shape[1]}")


def rotate(
    queries: list[Tensor],
    keys: list[Tensor],
    weights: list[tuple[Tensor, Tensor] | None],
    positions: Tensor,
    frequencies: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `reference.rotate`; sums and products are float32. Deterministic.

    Raises:
        UsageError: dtypes, head dimension, numbers of heads or positions that the kernels do not take.
    """
    _check(queries, keys, positions, frequencies)
    flat = [weight for pair in weights if pair is not None for weight in pair]
    normalized = [pair is not None for pair in weights]
    return _rotate(
        queries, keys, flat, positions, _unit_stride(frequencies), normalized, eps, zero_centered, interleaved
    )
