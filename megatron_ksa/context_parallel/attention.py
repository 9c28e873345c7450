"""KSA attention of one context-parallel rank: its own segments first, then halos and summaries of the other ranks.

Each segment's text queries attend twice, to their own segment while the exchange is under way and then to what it
brought; the two results are merged by their log-sum-exps (exactly the softmax over both).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.context_parallel.exchange import Exchange
from megatron_ksa.context_parallel.plan import HaloPlan, route, sees_summaries
from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_summary_attention, ksa_text_attention
from megatron_ksa.kernels.softmax_merge import merge
from megatron_ksa.layout.zigzag import ZigZag


def _far_text(plan: HaloPlan, received: Tensor) -> list[Tensor]:
    """The halo of each of this rank's segments, keys with values: [rows, 2, batch, K/V heads, head_dim]."""
    incoming = route(plan).incoming
    # One split, and not a slice for each piece, since each slice's gradient would be as large as the whole.
    arrived = dict(zip(incoming, received.split([len(piece) for piece in incoming]), strict=True)) if incoming else {}
    needed = [
        (pieces[0][1].start, torch.cat([arrived[piece] for _, piece in pieces]))
        for pieces in plan.sources(plan.split.rank)
    ]
    halos = []
    for halo in map(plan.halo, plan.split.segments()):
        # The last interval that begins at or before the halo holds all of it.
        start, rows = max(((s, r) for s, r in needed if s <= halo.start), key=lambda n: n[0], default=(0, received))
        # No rows, but a part of the graph; a slice would keep all of `received` for the backward pass.
        halos.append(rows[halo.start - start : halo.stop - start] if halo else received[:0].clone())
    return halos


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: KSAGeometry,
    *,
    text_rows: int,
    split: ZigZag,
    group: dist.ProcessGroup,
    document_start: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """KSA attention of this rank's rows, laid out `[text | summaries]`, each of both segments.

    Args:
        q: [rows, batch, heads, head_dim]; text rows then summary rows, or text rows only (full attention, with a window
            over the whole sequence).
        k, v: [rows, batch, K/V heads, head_dim].
        text_rows: text rows of this rank, both segments multiples of the chunk size.
        split: this rank's place in the zig-zag split.
        group: the context-parallel process group.
        document_start: int32 [batch, n] of the whole sequence, or None.

    Returns:
        [rows, batch, heads, head_dim].
    """
    text_length = text_rows * split.size
    plan = HaloPlan.of(geometry, text_length, split)
    (q_text, q_summary), (k_text, k_summary), (v_text, v_summary) = (
        rows.split([text_rows, rows.shape[0] - text_rows]) for rows in (q, k, v)
    )
    gather = bool(k_summary.shape[0]) and sees_summaries(geometry, text_length)
    exchange = Exchange(plan, group, gather)
    (k_text, v_text), in_flight = exchange.start((k_text, v_text), (k_summary, v_summary))

    options = {"document_start": document_start, "softmax_scale": softmax_scale}
    by_segment = [
        [rows.transpose(0, 1) for rows in tensor.chunk(2)]
        for tensor in (q_text, k_text, v_text, q_summary, k_summary, v_summary)
    ]
    near, summaries = [], []
    for segment, qs, ks, vs, *summary_rows in zip(split.segments(), *by_segment, strict=True):
        start, none = segment * plan.segment_rows, ks[:, :0]
        near.append(ksa_text_attention(qs, ks, vs, none, none, geometry, query_start=start, key_start=start, **options))
        if q_summary.shape[0]:
            q_of_chunks, *kv = summary_rows
            summaries.append(ksa_summary_attention(q_of_chunks, ks, vs, *kv, geometry, key_start=start, **options))

    received, gathered = exchange.finish(in_flight)
    k_all, v_all = (rows.transpose(0, 1) for rows in split.restore(gathered).unbind(1))
    text = []
    for segment, qs, (out, lse), halo in zip(
        split.segments(), by_segment[0], near, _far_text(plan, received), strict=True
    ):
        k_far, v_far = (rows.transpose(0, 1) for rows in halo.unbind(1))
        far_out, far_lse = ksa_text_attention(
            qs, k_far, v_far, k_all, v_all, geometry, query_start=segment * plan.segment_rows,
            key_start=plan.halo(segment).start, **options,
        )  # fmt: skip
        text.append(merge(out, lse, far_out, far_lse))
    return torch.cat([*text, *summaries], dim=1).transpose(0, 1)
