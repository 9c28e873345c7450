"""What the KSA attention kernels share: key intervals of queries, ranges of tiles, tensor descriptors.

Every text query sees one interval of text keys and one interval of summary keys, and the ends of both grow with the
query's position. A tile of queries therefore needs a mask only at both ends of the interval that its first and last
query span.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

LOG2E = 1.4426950408889634
LARGEST_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def key_interval(i, start, offset, num_keys, window, C: tl.constexpr, S: tl.constexpr, IS_TEXT: tl.constexpr):
    """Local rows [lower, upper) of the keys that the query at global position i sees; its document begins at start.

    offset: global position of text row 0 (IS_TEXT), or chunk of summary row 0.
    """
    if IS_TEXT:
        lower = tl.maximum((i // C - window) * C, start) - offset
        upper = i + 1 - offset
    else:
        # The summary of chunk c belongs to the document of token c * C + C - 1, so c * C + C - 1 >= start.
        lower = (start // C - offset) * S
        upper = (i // C - window - offset) * S
    return tl.maximum(lower, 0), tl.minimum(tl.maximum(upper, 0), num_keys)


@triton.jit
def first_after(p_start, key, low, high):
    """The first position in [low, high) whose document begins after `key`, or high: binary search."""
    while low < high:
        middle = (low + high) // 2
        if tl.load(p_start + middle) > key:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def query_interval(
    key, p_start, offset, query_start, nq, window, C: tl.constexpr, S: tl.constexpr, IS_TEXT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Local rows [lower, upper) of the queries that see local key row `key`; the inverse of `key_interval`."""
    if IS_TEXT:
        newest = key + offset
        lower = newest
        upper = tl.minimum((newest // C + window + 1) * C - query_start, nq)
    else:
        chunk = key // S + offset
        newest = chunk * C + C - 1
        lower = (chunk + window + 1) * C
        upper = nq
    lower = tl.minimum(tl.maximum(lower - query_start, 0), nq)
    upper = tl.maximum(upper, lower)
    if HAS_DOCUMENTS:
        upper = first_after(p_start, newest, lower + query_start, upper + query_start) - query_start
    return lower, upper


@triton.jit
def tile_ranges(lower, full_lower, full_upper, upper, BLOCK: tl.constexpr):
    """Tiles [first, stop) cover rows [lower, upper); of these, [full_first, full_stop) need no mask."""
    first = lower // BLOCK
    stop = tl.where(upper > lower, tl.cdiv(upper, BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_lower, BLOCK), first), stop)
    full_stop = tl.minimum(tl.maximum(full_upper // BLOCK, full_first), stop)
    return first, full_first, full_stop, stop


def descriptor(rows: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    """A descriptor of [B, n, H, D] rows as [B, H, n, D], read in blocks of [1, 1, block_rows, block_dim].

    What lies outside reads as 0. Columns beyond D do too, so D need not be a power of two.
    """
    batch, count, heads, dim = rows.shape
    strides = [rows.stride(0), rows.stride(2), rows.stride(1), 1]
    return TensorDescriptor(rows, [batch, heads, count, dim], strides, [1, 1, block_rows, block_dim])


def addressable(rows: Tensor) -> Tensor:
    """`rows`, copied only where the copy engine cannot address it: strides and start in units of 16 bytes."""
    units = [stride * rows.element_size() % 16 == 0 and stride > 0 for stride in rows.stride()[:-1]]
    if all(units) and rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def row_starts(document_start: Tensor | None, batch: int) -> Tensor | None:
    """`document_start` as the kernels read it: int32 [B, rows], last dimension contiguous."""
    if document_start is None:
        return None
    starts = document_start.to(torch.int32).expand(batch, -1)
    return starts if starts.stride(1) == 1 else starts.contiguous()


def finite_window(window_chunks: int, rows: int, chunk_size: int) -> int:
    """The window, at most the chunks in `rows` positions: the same attention, without overflow for a vast window."""
    return min(window_chunks, rows // chunk_size + 1)


def summary_divisor(geometry: KSAGeometry, summary_rows: int) -> int:
    """S as the kernels divide by it: 1 for a geometry without summaries (S = 0), whose calls have no summary rows."""
    if summary_rows and not geometry.summary_tokens:
        raise UsageError(f"{summary_rows} summary rows: a geometry with summary_tokens 0 has none")
    return max(geometry.summary_tokens, 1)


def check_rows(q: Tensor, keys: tuple[Tensor, ...], softmax_scale: float | None) -> float:
    """The softmax scale; refuses what the kernels cannot read, naming the value."""
    dim, heads, groups = q.shape[-1], q.shape[2], keys[0].shape[2]
    unit = 16 // q.element_size()
    if q.dtype not in DTYPES or any(rows.dtype != q.dtype for rows in keys):
        dtypes = ", ".join(str(rows.dtype) for rows in (q, *keys))
        raise UsageError(f"KSA attention got dtypes {dtypes}: one of bfloat16, float16 or float32 for all is needed")
    if dim > LARGEST_HEAD_DIM or dim % unit:
        raise UsageError(
            f"head_dim {dim}: KSA attention on the GPU needs a multiple of {unit} up to {LARGEST_HEAD_DIM}; "
            "set --kv-channels"
        )
    if heads % groups:
        raise UsageError(f"{heads} query heads do not divide into {groups} K/V heads; set --num-query-groups")
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    if scale <= 0:
        raise UsageError(f"softmax scale {scale}: KSA attention needs a positive one; set --softmax-scale")
    return scale
