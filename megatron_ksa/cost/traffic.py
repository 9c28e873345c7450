"""What context parallelism sends: K/V rows and bytes per rank and layer, beside the all-gather of full attention.

Counts are of one sequence. The backward pass sends gradients of what was received, all ranks together as much as in the
forward pass; recomputed layers send the forward part once more.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ksa.config.ksa import KSAConfig, KSALayer, LayerKind
from megatron_ksa.context_parallel.plan import HaloPlan, sees_summaries
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.layout.zigzag import ZigZag


@dataclass(frozen=True)
class HeadShape:
    """Heads of one tensor-parallel rank: query heads, K/V heads, head_dim, and bytes of an element.

    Fewer K/V heads than tensor-parallel ranks are one a rank.
    """

    query: int
    kv: int
    dim: int
    element_bytes: int

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one row of keys and values."""
        return 2 * self.kv * self.dim * self.element_bytes


def rows_sent(geometry: KSAGeometry, text_length: int, split: ZigZag, *, backward: bool = False) -> int:
    """K/V rows, or rows of their gradients, that this rank sends in one pass of a layer: halos, and its share of the
    all-gather of summaries or of the reduce-scatter of their gradients.

    Never more than n * S / C + 2 * W * C.
    """
    plan = HaloPlan.of(geometry, text_length, split)
    text = plan.rows_received(split.rank) if backward else plan.rows_sent(split.rank)
    if not sees_summaries(geometry, text_length):
        return text
    summaries = RowLayout(geometry.chunk_size, geometry.summary_tokens).summary_rows(text_length)
    return text + summaries // split.size * (split.size - 1)


def all_gather_rows(text_length: int, size: int) -> int:
    """K/V rows that a rank sends where full attention gathers keys and values."""
    return text_length // size * (size - 1)


def all_to_all_bytes(rows: int, heads: HeadShape, size: int) -> int:
    """Bytes that a rank sends of its `rows`: query, key and value to the owners of the heads, and the output back."""
    row_heads = 2 * heads.query + 2 * max(heads.kv, size)
    return rows * row_heads * heads.dim * heads.element_bytes // size * (size - 1)


def bytes_sent(
    layer: KSALayer,
    ksa: KSAConfig,
    text_length: int,
    size: int,
    comm: str,
    heads: HeadShape,
    *,
    forwards: int = 1,
    backwards: int = 0,
) -> int:
    """Bytes that the busiest rank sends in `forwards` forward and `backwards` backward passes of one layer.

    `comm` is the layer's `--cp-comm-type`.
    """
    full = layer.kind == LayerKind.FULL
    if comm == "a2a":
        summaries = ksa.rows.summary_rows(text_length) * layer.has_summaries
        return (forwards + backwards) * all_to_all_bytes((text_length + summaries) // size, heads, size)
    geometry = KSAGeometry(ksa.chunk_size, ksa.summary_tokens * layer.has_summaries, layer.window_chunks)
    if full:
        geometry = KSAGeometry(1, 0, text_length)
    ranks = [ZigZag(rank, size) for rank in range(size)]
    rows = [
        forwards * rows_sent(geometry, text_length, rank)
        + backwards * rows_sent(geometry, text_length, rank, backward=True)
        for rank in ranks
    ]
    return max(rows) * heads.kv_row_bytes


def report(
    ksa: KSAConfig, num_layers: int, text_length: int, size: int, comm: str | Sequence[str], heads: HeadShape
) -> str:
    """A table with a line for each kind of layer: bytes sent, and how often full attention's all-gather is that.

    Args:
        size: context-parallel size.
        comm: `--cp-comm-type` of all layers, or one a layer.
    """
    plan = ksa if ksa.enabled else dataclasses.replace(ksa, layer_pattern="f")
    comms = [comm] * num_layers if isinstance(comm, str) else comm
    kinds = Counter(zip(plan.layers(num_layers, text_length), comms, strict=True))
    gathered = all_gather_rows(text_length, size) * heads.kv_row_bytes
    lines = [
        f"context parallelism over {size} ranks: MB that a rank sends at most in a layer's forward pass of one "
        f"sequence; the all-gather of full attention sends {gathered / 1e6:,.3f} MB"
    ]
    for (layer, kind), count in kinds.items():
        sent = bytes_sent(layer, ksa, text_length, size, kind, heads)
        window = "" if layer.kind == LayerKind.FULL else f", window {layer.window_chunks} chunks"
        lines.append(
            f"  {count} x {layer.kind.name.lower().replace('_', '-')}{window}, {kind}: {sent / 1e6:,.3f} MB, "
            f"1/{gathered / max(sent, 1):.1f}"
        )
    return "\n".join(lines)
