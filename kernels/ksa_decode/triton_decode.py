"""`decode_attention` of reference.py in Triton: which tiles, the launches of a step, and the public function."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.ksa_attention.triton_common import LOG2E, check_rows
from megatron_ksa.kernels.ksa_attention.triton_config import padded_head_dim
from megatron_ksa.kernels.ksa_decode.geometry import CacheGeometry
from megatron_ksa.kernels.ksa_decode.triton_kernels import keep_kernel, merge_kernel, summary_kernel, text_kernel
from megatron_ksa.kernels.launch import launch, repeatable

# The merge holds all parts of a head at a time.
MOST_SPLITS = 64
SMALLEST_BLOCK = 16


class DecodeTile(NamedTuple):
    """How the text queries' kernel runs.

    Attributes:
        keys: of a tile.
        warps: of a program.
        stages: of its pipeline.
        programs: for each multiprocessor. They decide into how many parts a sequence's keys are cut (`splits`): all
            programs run at once, and end together where the sequences have equal lengths.
    """

    keys: int
    warps: int
    stages: int
    programs: int


# Tiles for 16-bit rows (HALF) and for float32 ones (SINGLE), by padded head dimension. Three programs of 70 KiB fit the
# shared memory of a Hopper multiprocessor. docs/generation.md has times with these tiles; no others were tried.
HALF = {64: DecodeTile(128, 4, 3, 3), 128: DecodeTile(64, 4, 3, 3), 256: DecodeTile(32, 4, 3, 3)}
SINGLE = {64: DecodeTile(64, 4, 2, 3), 128: DecodeTile(32, 4, 2, 3), 256: DecodeTile(16, 4, 2, 3)}


def default_tile(head_dim: int, dtype: torch.dtype) -> DecodeTile:
    """The tile where none is given."""
    return (SINGLE if dtype == torch.float32 else HALF)[max(64, padded_head_dim(head_dim))]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits(tile: DecodeTile, batch: int, groups: int, rows: int, device: torch.device) -> int:
    """Into how many parts each sequence's keys are cut.

    The cache's rows decide, as if every sequence filled them: a step in a CUDA graph cannot look at the lengths.
    """
    wanted = tile.programs * _multiprocessors(device) // (batch * groups)
    return max(min(wanted, triton.cdiv(rows, tile.keys), MOST_SPLITS), 1)


class Step(NamedTuple):
    """Tensors of a step: arguments and result of `reference.decode_attention`, and results of its parts.

    part and lse2 are None where a sequence's keys have one part: float32 [B, Hq * parts, D] and [B, Hq * parts].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor
    starts: Tensor
    out: Tensor
    part: Tensor | None
    lse2: Tensor | None


def _block(size: int) -> int:
    return max(SMALLEST_BLOCK, triton.next_power_of_2(size))


@repeatable
def _launch(step: Step, settings: tuple[CacheGeometry, float, DecodeTile, int]) -> None:
    geometry, scale, tile, parts = settings
    rows, batch, heads, dim = step.q.shape
    groups, summary_tokens = step.k.shape[2], rows - 1
    cache = (*step.key_cache.stride()[:3],)
    q, k, v, out = (rows.stride()[:3] for rows in (step.q, step.k, step.v, step.out))
    shared = {"C": geometry.chunk_size, "D": dim, "BD": padded_head_dim(dim)}
    caches = (step.key_cache, step.value_cache, step.slots, step.starts)
    launch(
        keep_kernel, (batch, rows), step.k, step.v, *caches, geometry.ring, geometry.summaries, *k, *v, *cache,
        S=summary_tokens, GROUPS=groups, BG=triton.next_power_of_2(groups), **shared, num_warps=tile.warps,
    )  # fmt: skip
    part, lse2 = (step.out if rows is None else rows for rows in (step.part, step.lse2))
    launch(
        text_kernel, (parts, groups, batch), step.q, *caches, step.out, part, lse2,
        geometry.ring, geometry.summaries, geometry.window_chunks, scale * LOG2E, parts, *q[1:], *cache, *out[1:],
        S=geometry.summary_tokens, GROUP=heads // groups, BM=_block(heads // groups), BN=tile.keys, SPLIT=parts > 1,
        ROOM=geometry.window is not None, **shared, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        launch(
            merge_kernel, (heads, batch), step.part, step.lse2, step.out, parts, *out[1:],
            GROUP=heads // groups, D=dim, BD=shared["BD"], BS=triton.next_power_of_2(parts), num_warps=tile.warps,
        )  # fmt: skip
    if summary_tokens:
        launch(
            summary_kernel, (groups, batch), step.q, step.k, step.v, *caches, step.out, geometry.ring, scale * LOG2E,
            *q, *k, *v, *cache, *out,
            S=summary_tokens, GROUP=heads // groups, BM=_block(summary_tokens * heads // groups),
            BN=min(_block(geometry.chunk_size), 64), BS=_block(summary_tokens), **shared, num_warps=tile.warps,
        )  # fmt: skip


def _check(q: Tensor, k: Tensor, key_cache: Tensor, value_cache: Tensor, geometry: CacheGeometry) -> None:
    expected = (key_cache.shape[0], k.shape[2], geometry.rows, q.shape[-1])
    for cache in (key_cache, value_cache):
        if tuple(cache.shape) != expected or not cache.is_contiguous():
            raise UsageError(
                f"a cache {tuple(cache.shape)}, contiguous {cache.is_contiguous()}: {expected} contiguous is needed"
            )


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    starts: Tensor,
    geometry: CacheGeometry,
    *,
    softmax_scale: float | None = None,
    tile: DecodeTile | None = None,
    parts: int | None = None,
) -> Tensor:
    """Arguments and result as in `reference.decode_attention`, for bfloat16, float16 and float32.

    Nothing waits for the device, and nothing depends on the lengths on the host: the step can be captured in a CUDA
    graph. Deterministic, and a sequence's output does not depend on the other sequences.

    Args:
        tile: of the text queries' kernel; by default that for the head dimension and dtype.
        parts: of each sequence's keys; by default as many as fill the GPU.

    Raises:
        UsageError: a dtype, head dimension or number of heads that the kernels do not have, or a cache of other rows.
    """
    scale = check_rows(q, (k, v, key_cache, value_cache), softmax_scale)
    _check(q, k, key_cache, value_cache, geometry)
    _, batch, heads, dim = q.shape
    tile = tile or default_tile(dim, q.dtype)
    parts = parts or splits(tile, batch, k.shape[2], geometry.rows, q.device)
    q, k, v = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (q, k, v))
    slots, starts = slots.contiguous(), starts.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = lse2 = None
    if parts > 1:
        # [B, Hkv, parts, Hq / Hkv] in memory, of vectors and of numbers.
        part = torch.empty((batch, heads * parts, dim), dtype=torch.float32, device=q.device)
        lse2 = torch.empty((batch, heads * parts), dtype=torch.float32, device=q.device)
    _launch(Step(q, k, v, key_cache, value_cache, slots, starts, out, part, lse2), (geometry, scale, tile, parts))
    return out
