"""Attention ops: KSA, FlexAttention with KSA's mask in two orders of the rows, and full causal attention by cuDNN."""

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from megatron_ksa.kernels.benchmarks import attention_features
from megatron_ksa.kernels.benchmarks.registry import BOTH, FORWARD, Case, Op, Shape, small_shapes
from megatron_ksa.kernels.ksa_attention import reference, triton_joint

NAMES = ("out", "dq", "dk", "dv")


def visible_pairs(shape: Shape) -> int:
    """Query-key pairs of the text queries of a sequence."""
    i = torch.arange(shape.n)
    past = (i // shape.chunk_size - shape.window_chunks).clamp(min=0)
    return int((i + 1 - past * shape.chunk_size + past * shape.summary_tokens).sum())


def attention_case(
    shape: Shape, rows: int, run: Callable, expected: Callable, pairs: int, device: str, **facts
) -> Case:
    """A case of attention among `rows` rows of each of q, k and v, whose text queries see `pairs` keys in all."""
    leaves = [shape.random(rows, heads, device) for heads in (shape.heads, shape.groups, shape.groups)]
    flops = 4.0 * pairs * shape.batch * shape.heads * shape.head_dim
    # Output, three gradients, and three float32 statistics of a row.
    results = sum(leaf.numel() * leaf.element_size() for leaf in (leaves[0], *leaves))
    return Case(
        leaves, run, expected, NAMES, flops={FORWARD: flops, BOTH: 3.5 * flops},
        needed_bytes=results + 3 * 4 * shape.batch * rows * shape.heads, facts={"visible_pairs": pairs} | facts,
    )  # fmt: skip


def _ksa(shape: Shape, device: str) -> Case:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (triton_joint.attention(q, k, v, shape.geometry, text_rows=shape.n),)

    def expected(*rows: Tensor) -> tuple[Tensor]:
        return (reference.attention(*rows, shape.geometry, text_rows=shape.n),)

    return attention_case(shape, shape.rows, run, expected, visible_pairs(shape), device)


def _window(shape: Shape, device: str) -> Case:
    return _ksa(dataclasses.replace(shape, summary_tokens=0), device)


def _full(shape: Shape, device: str) -> Case:
    grouped = shape.heads != shape.groups
    backend = "math" if device == "cpu" else "cudnn"

    def run(*rows: Tensor) -> tuple[Tensor]:
        with sdpa_kernel(SDPBackend.MATH if device == "cpu" else SDPBackend.CUDNN_ATTENTION):
            heads = [t.transpose(1, 2) for t in rows]
            return (F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=grouped).transpose(1, 2),)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        causal = attention_features.CAUSAL
        return (reference.text_attention(q, k, v, k[:, :0], v[:, :0], causal)[0],)

    return attention_case(shape, shape.n, run, expected, shape.n * (shape.n + 1) // 2, device, backend=backend)


def mask(shape: Shape, interleaved: bool) -> Callable[..., Tensor]:
    """KSA's visibility as FlexAttention asks for it (rules in `ksa_attention/reference.py`)."""
    n, chunk_size, summary_tokens, window = shape.n, shape.chunk_size, shape.summary_tokens, shape.window_chunks
    stride = chunk_size + summary_tokens

    def place(row: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a row is text, and its chunk."""
        if interleaved:
            return row % stride < chunk_size, row // stride
        is_text = row < n
        return is_text, torch.where(is_text, row // chunk_size, (row - n) // summary_tokens)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_is_text, query_chunk = place(query)
        key_is_text, key_chunk = place(key)
        distance, past = query_chunk - key_chunk, key <= query
        from_text = torch.where(key_is_text, past & (distance <= window), distance > window)
        from_summary = (distance == 0) & (key_is_text | past)
        return torch.where(query_is_text, from_text, from_summary)

    return visible


def natural_order(shape: Shape, device: str) -> Tensor:
    """Rows `[text | summaries]` in the order of the sequence, each chunk's summaries after its text: int64 [rows]."""
    text = torch.arange(shape.n, device=device)
    summary = torch.arange(shape.summary_rows, device=device)
    place = torch.cat([text // shape.chunk_size * 2, summary // shape.summary_tokens * 2 + 1])
    return place.argsort(stable=True)


def _block_mask(shape: Shape, interleaved: bool, device: str) -> tuple[BlockMask, float]:
    """The block mask, built by a compiled function (an n x n mask would not fit), and seconds of a second build."""
    build = create_block_mask if device == "cpu" else torch.compile(create_block_mask, dynamic=False)
    for _ in range(2):
        start = time.perf_counter()
        blocks = build(mask(shape, interleaved), None, None, shape.rows, shape.rows, device=device)
        if device != "cpu":
            torch.cuda.synchronize()
    return blocks, time.perf_counter() - start


def _attend(shape: Shape, interleaved: bool, blocks: BlockMask, device: str) -> Callable[..., Tensor]:
    """FlexAttention compiled for one shape; on a CPU, where it has no backward pass, attention with the dense mask."""
    grouped = shape.heads != shape.groups
    if device == "cpu":
        dense = create_mask(mask(shape, interleaved), 1, 1, shape.rows, shape.rows, device=device)
        return lambda *heads: F.scaled_dot_product_attention(*heads, attn_mask=dense, enable_gqa=grouped)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda *heads: compiled(*heads, block_mask=blocks, enable_gqa=grouped)


def _flex(interleaved: bool) -> Callable[[Shape, str], Case]:
    def prepare(shape: Shape, device: str) -> Case:
        # A shape is compiled afresh: after eight shapes the compiler would fall back to the n x n scores of eager mode.
        torch.compiler.reset()
        blocks, seconds = _block_mask(shape, interleaved, device)
        attend = _attend(shape, interleaved, blocks, device)
        order = natural_order(shape, device) if interleaved else torch.arange(shape.rows, device=device)

        def run(*rows: Tensor) -> tuple[Tensor]:
            heads = [t.transpose(1, 2) for t in rows]
            return (attend(*heads).transpose(1, 2),)

        def expected(*rows: Tensor) -> tuple[Tensor]:
            split = [t[:, order.argsort()] for t in rows]
            return (reference.attention(*split, shape.geometry, text_rows=shape.n)[:, order],)

        facts = {"block_mask_seconds": seconds, "block_mask_sparsity_percent": float(blocks.sparsity())}
        return attention_case(shape, shape.rows, run, expected, visible_pairs(shape), device, **facts)

    return prepare


def _check_shapes(device: str) -> list[Shape]:
    return small_shapes(device, (4, 4), (4, 2))


def _grouped(device: str) -> list[Shape]:
    return small_shapes(device, (4, 2))


KSA = Op("ksa", "KSA, rows laid out [text | summaries]", _ksa, _check_shapes, attention_features.check)
WINDOW = Op("window", "the same window without summaries, in the same kernels", _window, _check_shapes)
FULL = Op(
    "full_attention", "full causal attention by cuDNN", _full, lambda device: small_shapes(device, (4, 4)),
    poisoned=False,
)  # fmt: skip
FLEX = Op(
    "flex_attention", "FlexAttention, KSA's mask, rows [text | summaries]", _flex(False), _grouped, poisoned=False
)
FLEX_INTERLEAVED = Op(
    "flex_attention_interleaved", "FlexAttention, KSA's mask, rows in the order of the sequence", _flex(True),
    _grouped, poisoned=False,
)  # fmt: skip
