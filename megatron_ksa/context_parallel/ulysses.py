"""Context parallelism by an all-to-all over heads (DeepSpeed Ulysses, arXiv 2309.14509): `--cp-comm-type a2a`.

Every rank gets all rows of a part of the heads, attends as if there were no context parallelism, and returns the rows.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.layout.zigzag import ZigZag


def _to_heads(rows: Tensor, split: ZigZag, text_rows: int, group: dist.ProcessGroup) -> Tensor:
    """[rows of the rank, batch, heads, head_dim] -> [rows of the sequence, batch, heads / size, head_dim].

    Both are laid out `[text | summaries]`, the one by segment and the other in the order of the sequence.
    """
    outgoing = rows.unflatten(2, (split.size, -1)).movedim(2, 0).flatten(0, 1)
    by_rank = all_to_all(group, outgoing).unflatten(0, (split.size, -1))
    text, summaries = by_rank.split([text_rows, rows.shape[0] - text_rows], dim=1)
    return torch.cat([split.restore(part.flatten(0, 1)) for part in (text, summaries)])


def _to_rows(heads: Tensor, split: ZigZag, layout: RowLayout, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `_to_heads`."""
    by_rank = [split.by_rank(part).unflatten(0, (split.size, -1)) for part in layout.split(heads)]
    returned = all_to_all(group, torch.cat(by_rank, dim=1).flatten(0, 1))
    return returned.unflatten(0, (split.size, -1)).movedim(0, 2).flatten(2, 3)


def all_to_all_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: RowLayout,
    split: ZigZag,
    group: dist.ProcessGroup,
) -> Tensor:
    """`attend` on all rows of the sequence and a part of the heads.

    Args:
        attend: q, k, v of the whole sequence, [rows, batch, heads, head_dim], to its output of q's shape.
        q: [rows of the rank, batch, heads, head_dim], heads a multiple of the context-parallel size.
        k, v: K/V heads a multiple or a divisor of the context-parallel size; fewer heads are repeated.

    Returns:
        [rows of the rank, batch, heads, head_dim].
    """
    copies = split.size // k.shape[2] if k.shape[2] < split.size else 1
    if copies > 1:
        k, v = (rows.repeat_interleave(copies, dim=2) for rows in (k, v))
    text_rows = layout.text_rows(q.shape[0])
    out = attend(*(_to_heads(rows, split, text_rows, group) for rows in (q, k, v)))
    return _to_rows(out, split, layout, group)
