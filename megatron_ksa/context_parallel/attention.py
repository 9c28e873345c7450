"""KSA attention of one context-parallel rank: its own segments, the halos before them, and summaries of other segments.

Each of a rank's two segments attends to itself as if it were a whole sequence, with its summaries and their queries,
while halos and summaries travel; then its text queries attend to those, and the two results are merged by their
log-sum-exps: exactly the softmax over both. The first segment of a sequence needs nothing of others.

One autograd function holds the exchange and all attention, so that results and gradients are written where the layer
needs them. Both backward passes take the merged output O and log-sum-exp, as ring attention's do (arXiv 2310.01889):
with P = exp(scores - lse), of all keys that a query sees,

    dS = P * (dP - rowsum(dO * O)),

so that neither attention's own output is kept and the merge has no backward pass.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ksa.context_parallel.exchange import Exchange
from megatron_ksa.context_parallel.halos import HaloGradients, halo_of, kept_for_halos
from megatron_ksa.context_parallel.plan import HaloPlan, sees_summaries
from megatron_ksa.context_parallel.segments import Layer, Rank, by_batch, no_summaries
from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_backward, ksa_forward
from megatron_ksa.kernels.ksa_attention.operands import Gradients, SummaryBackward, SummaryForward, TextOutputs
from megatron_ksa.kernels.softmax_merge import merge_into
from megatron_ksa.layout.zigzag import ZigZag


class _Attention(torch.autograd.Function):
    """Output and gradients are contiguous. Saved beside q, k, v and the output are the log-sum-exps of the text
    queries, halos of other ranks, and summaries of all segments before the rank's last one.
    """

    @staticmethod
    def forward(
        ctx, layer: Layer, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None
    ) -> Tensor:
        out = q.new_empty(q.shape)
        rank, outputs = Rank(layer, q, k, v, document_start), layer.split(out)
        exchange = Exchange(layer.plan, group, layer.gather)
        exchange.send(rank.text, rank.summaries)

        results = []
        for place in range(2):
            rows, summary_q = rank.own(place)
            text, summaries = (by_batch(part) for part in outputs[place::2])
            results.append(TextOutputs(text, layer.new_lse(rows.q)))
            ksa_forward(rows, SummaryForward(summary_q, summaries), results[-1], layer.sizes())

        received, gathered = exchange.receive()
        kept, every = kept_for_halos(layer.plan, received, rank.text), None
        if gathered is not None:
            every = torch.cat(layer.plan.split.by_segment(gathered)[: layer.segments[1]])
        del received, gathered

        for place, (text, lse) in enumerate(results):
            if count := layer.far_rows(place):
                rows, sizes = rank.far(place, halo_of(layer.plan, place, kept, rank.text), every)
                far = TextOutputs(torch.empty_like(rows.q), layer.new_lse(rows.q))
                ksa_forward(rows, no_summaries(SummaryForward, rows.q), far, sizes)
                merge_into(text[:, :count], lse[..., :count], *far)

        ctx.layer, ctx.group = layer, group
        ctx.save_for_backward(q, k, v, document_start, out, *(lse for _, lse in results), every, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, document_start, out, first, second, every, *kept = ctx.saved_tensors
        layer, rank = ctx.layer, Rank(ctx.layer, q, k, v, document_start)
        outputs = layer.split(out)
        results = [TextOutputs(by_batch(outputs[place]), lse) for place, lse in enumerate((first, second))]
        d_results = [by_batch(part) for part in layer.split(d_out)]
        gradients = [rows.new_empty(rows.shape) for rows in (q, k, v)]
        dq, dk, dv = (layer.split(rows) for rows in gradients)
        d_text = list(zip(dk[:2], dv[:2], strict=True))

        # What goes back to other ranks comes first, and travels during the rest.
        halos = HaloGradients(layer.plan, kept)
        far_dq, d_every = _far_gradients(rank, halos, results, d_results, kept, every)
        exchange = Exchange(layer.plan, ctx.group, layer.gather)
        exchange.send_back(halos.returned(), d_every)
        del d_every

        for place in range(2):
            rows, summary_q = rank.own(place)
            (dq_text, dq_summary), (dk_text, dk_summary), (dv_text, dv_summary) = (
                map(by_batch, parts[place::2]) for parts in (dq, dk, dv)
            )
            ksa_backward(
                rows, SummaryBackward(summary_q, d_results[2 + place], dq_summary), results[place], d_results[place],
                Gradients(dq_text, dk_text, dv_text, dk_summary, dv_summary), layer.sizes(),
            )  # fmt: skip
            if place in far_dq:
                dq_text[:, : layer.far_rows(place)].add_(far_dq.pop(place))
        halos.add_own(d_text)
        exchange.receive_back(d_text, tuple(rows[2 * layer.plan.segment_rows :] for rows in gradients[1:]))
        return None, None, *gradients, None


def _far_gradients(
    rank: Rank, halos: HaloGradients, results: Sequence[TextOutputs], d_results: Sequence[Tensor],
    kept: Sequence[Tensor], every: Tensor | None,
) -> tuple[dict[int, Tensor], Tensor | None]:  # fmt: skip
    """Backward pass of the attention to other segments; fills `halos`.

    Returns:
        dQ of the queries that see anything of them, by segment, and the gradients of all summaries in the order of
        ranks.
    """
    layer, far_dq = rank.layer, {}
    d_every = None if every is None else torch.empty_like(every)
    for place in (1, 0):
        if not (count := layer.far_rows(place)):
            continue
        rows, sizes = rank.far(place, halo_of(layer.plan, place, kept, rank.text), every)
        far_dq[place], d_halo = torch.empty_like(rows.q), halos.of(place)
        if every is None:
            d_before = d_halo[:0]
        else:
            # The last segment sees all summaries that are there.
            d_before = d_every if place else torch.empty_like(d_every[: layer.summaries(layer.segments[0])])
        d_keys = (by_batch(kind) for both in (d_halo, d_before) for kind in both.unbind(1))
        text, lse = results[place]
        ksa_backward(
            rows, no_summaries(SummaryBackward, rows.q), TextOutputs(text[:, :count], lse[..., :count].contiguous()),
            d_results[place][:, :count], Gradients(far_dq[place], *d_keys), sizes,
        )  # fmt: skip
        if every is not None and not place:
            d_every[: len(d_before)].add_(d_before)
    if every is None:
        return far_dq, None
    seen = d_every.split(layer.summaries(1))
    unseen = [torch.zeros_like(seen[0])] * (2 * layer.plan.split.size - len(seen))
    return far_dq, layer.plan.split.join([*seen, *unseen])


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
    gather = q.shape[0] > text_rows and sees_summaries(geometry, text_length)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    layer = Layer(geometry, HaloPlan.of(geometry, text_length, split), gather, scale)
    return _Attention.apply(layer, group, q, k, v, document_start)
