"""Cross-entropy and KL divergence to the teacher in chunks of tokens: logits of neither head ever exist whole.

Both heads are the same frozen output layer. A token's losses depend on its own hidden state alone, so that the gradient
for the hidden states is formed in the forward pass, up to a factor of each token: three products of rows and weight in
all, and no logits again in the backward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.kernels.distillation import RowStatistics, gradients, statistics
from megatron_ksa.model.chunked_loss import OutputShard, weight_of


class TokenLosses(NamedTuple):
    """Losses of each token, float32 [batch, n], in nats: the weighted sum, which has a gradient, and its terms."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class _ChunkedDistillation(torch.autograd.Function):
    """loss = w_ce * CE + w_kl * KL(teacher || student) of every token, chunk after chunk."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor, shard: OutputShard,
        ce_weight: float, kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Arguments and result as in `chunked_distillation`."""
        labels = labels.t().contiguous()
        losses = torch.empty(2, *labels.shape, dtype=torch.float32, device=hidden.device)
        trains = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if trains else None
        for chunk in shard.chunks(hidden):
            label = shard.by_shard(labels)[:, chunk].reshape(-1)
            label = shard.from_first_word(label, weight.shape[0])
            ours, theirs = (shard.whole_rows(part[chunk]) @ weight.t() for part in (hidden, teacher))
            rows = _of_all_shards(statistics(ours, theirs, label, shard.scale), shard)
            for whole, part in zip(losses, (rows.cross_entropy(), rows.divergence()), strict=True):
                target = shard.by_shard(whole)[:, chunk]
                target.copy_(part.view_as(target))
            if trains:
                d_logits = gradients(ours, theirs, label, rows, ce_weight, kl_weight, shard.scale)
                work = shard.return_rows(d_logits @ weight, d_hidden[chunk])
                if work is not None:
                    work.wait()
        ctx.shard = shard
        ctx.save_for_backward(d_hidden)
        cross_entropy, divergence = (part.t().contiguous() for part in losses)
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return ce_weight * cross_entropy + kl_weight * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: FunctionCtx, d_total: Tensor, *_none: Tensor) -> tuple[Tensor | None, ...]:
        """d hidden = what the forward pass formed * d loss of the token."""
        (d_hidden,) = ctx.saved_tensors
        shard: OutputShard = ctx.shard
        d_rows = shard.by_shard(d_total.t().contiguous())
        d_rows = d_rows[shard.group.rank() if shard.gathers else 0]
        return (d_hidden * d_rows[..., None]).to(d_hidden.dtype), None, None, None, None, None, None


def _of_all_shards(rows: RowStatistics, shard: OutputShard) -> RowStatistics:
    """Statistics of the words of all ranks."""
    if shard.group.size() == 1:
        return rows
    peaks = shard.reduce(torch.stack([rows.peak, rows.teacher_peak]), dist.ReduceOp.MAX)
    factor, teacher_factor = (rows.peak - peaks[0]).exp(), (rows.teacher_peak - peaks[1]).exp()
    sums = torch.stack(
        [rows.total * factor, rows.picked, rows.teacher_total * teacher_factor, rows.cross * teacher_factor]
    )
    total, picked, teacher_total, cross = shard.reduce(sums, dist.ReduceOp.SUM)
    return RowStatistics(peaks[0], total, picked, peaks[1], teacher_total, cross)


def chunked_distillation(
    hidden: Tensor,
    teacher: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: int,
    group: dist.ProcessGroup,
    config: DistillConfig,
    *,
    sequence_parallel: bool = False,
    scale: float = 1.0,
) -> TokenLosses:
    """Losses of every token, from student's and teacher's hidden states; the output layer is frozen.

    Args:
        hidden, teacher: [n, batch, hidden], or [n / tp, batch, hidden] with sequence parallelism.
        weight: [words / tp, hidden], the rank's part of the output layer of both.
        labels: int64 [batch, n], words of the whole vocabulary.
        rows: tokens whose logits exist at a time on this rank.
        group: tensor-parallel group.
        scale: factor of the logits.
    """
    shard = OutputShard.of(hidden, rows, group, sequence_parallel=sequence_parallel, scale=scale)
    return TokenLosses(
        *_ChunkedDistillation.apply(hidden, teacher, weight.detach(), labels, shard, config.ce_weight, config.kl_weight)
    )


class DistillationLoss:
    """Megatron's `output_processor`: hidden states of student and teacher to losses."""

    def __init__(self, loss: LossConfig, config: DistillConfig) -> None:
        self.loss, self.config = loss, config

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        labels: Tensor,
        context: Tensor,
        config: TransformerConfig,
        **_unused: Any,
    ) -> TokenLosses:
        """Losses of every token. Arguments are GPTModel's; `context` is the teacher's hidden states."""
        weight = weight_of(output_layer, output_weight)
        return chunked_distillation(
            hidden_states,
            context,
            weight,
            labels,
            # Two heads' logits exist at a time.
            self.loss.rows_at_a_time(labels.numel(), 2 * weight.shape[0]),
            output_layer.tp_group,
            self.config,
            sequence_parallel=output_layer.sequence_parallel,
            scale=config.mup_output_mult if config.use_mup else 1.0,
        )
