"""Output layer and vocabulary-parallel cross-entropy in chunks of tokens: logits of a whole sequence never exist.

Megatron-Core 0.19.2 has no fused linear cross-entropy. Its `--cross-entropy-loss-fusion` (native and Transformer
Engine) fuses the softmax's arithmetic and takes logits [n, batch, words], which at 131,072 tokens and 151,936 words are
80 GB in float32 on one rank. Here a chunk's logits are computed, reduced to the loss and dropped; the backward pass
computes them again, from which come the gradients of the chunk's rows and its part of the weight's gradient. The price
is one more product of rows and weight: 4 of them instead of 3. Where a micro-batch's logits in the parameters'
precision are small enough (2.5 GB at 8,192 tokens), they are kept instead, and their gradients take their place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_ksa.config.loss import LossConfig
from megatron_ksa.kernels.cross_entropy import gradients, statistics
from megatron_ksa.kernels.weight_gradient import add_product
from megatron_ksa.upstream.saved_weights import in_its_buffer


@dataclass(frozen=True)
class OutputShard:
    """This rank's part of the output layer.

    Attributes:
        group: the tensor-parallel group, which divides the words.
        gathers: rows are divided as well (sequence parallelism).
        fused: the weight's gradient is added to `main_grad` by Megatron's kernel (gradient accumulation fusion).
        positions: sequence positions of this rank's rows in a chunk.
        scale: factor of the logits (muP).
        keeps: logits stay in memory until the backward pass.
    """

    group: dist.ProcessGroup
    gathers: bool
    fused: bool
    positions: int
    scale: float
    keeps: bool = False

    @classmethod
    def of(
        cls, hidden: Tensor, rows: int, group: dist.ProcessGroup, *, sequence_parallel: bool, scale: float,
        fused: bool = False, keeps: bool = False,
    ) -> "OutputShard":  # fmt: skip
        """The shard for hidden states [n, batch, hidden] of which `rows` tokens are taken at a time.

        At least a position of each row shard and sample.
        """
        shards = group.size() if sequence_parallel else 1
        return cls(group, sequence_parallel, fused, max(rows // (hidden.shape[1] * shards), 1), scale, keeps)

    @property
    def row_shards(self) -> int:
        return self.group.size() if self.gathers else 1

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Positions of each chunk among this rank's rows."""
        for begin in range(0, hidden.shape[0], self.positions):
            yield slice(begin, min(begin + self.positions, hidden.shape[0]))

    def whole_rows(self, rows: Tensor) -> Tensor:
        """[positions, batch, hidden] -> [row shards * positions * batch, hidden], those of all row shards."""
        if self.gathers:
            gathered = rows.new_empty(self.row_shards * rows.shape[0], *rows.shape[1:])
            dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.group)
            rows = gathered
        return rows.flatten(0, 1)

    def by_shard(self, tensor: Tensor) -> Tensor:
        """[n, batch] -> [row shards, positions of a shard, batch], a view."""
        return tensor.unflatten(0, (self.row_shards, -1))

    def from_first_word(self, labels: Tensor, words: int) -> Tensor:
        """Labels counted from this rank's first word; those of other ranks are outside its `words`."""
        return labels - self.group.rank() * words

    def statistics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, sum(exp(logit - largest)) and the label's logit, of the words of all ranks."""
        rank_peak, total, picked = statistics(logits, self.from_first_word(labels, logits.shape[1]), self.scale)
        if self.group.size() == 1:
            return rank_peak, total, picked
        peak = self.reduce(rank_peak.clone(), dist.ReduceOp.MAX)
        total, picked = self.reduce(torch.stack([total * (rank_peak - peak).exp(), picked]), dist.ReduceOp.SUM)
        return peak, total, picked

    def reduce(self, tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
        """All-reduce in place over the ranks that divide the words."""
        if self.group.size() > 1:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor

    def return_rows(self, gradient: Tensor, out: Tensor) -> dist.Work | None:
        """Sum the gradients of a chunk's rows over the ranks into this rank's rows `out`; to be waited for."""
        if self.gathers:
            return dist.reduce_scatter_tensor(out, gradient.view(-1, *out.shape[1:]), group=self.group, async_op=True)
        out.copy_(gradient.view_as(out))
        return dist.all_reduce(out, group=self.group, async_op=True) if self.group.size() > 1 else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """loss = log(sum(exp(logits))) - logits[label] with logits = scale * hidden @ weight^T, chunk after chunk."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, shard: OutputShard) -> Tensor:
        """Arguments and result as in `chunked_cross_entropy`."""
        labels = labels.t().contiguous()
        losses, peaks, totals = (torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))
        # By each chunk's first position.
        ctx.logits = {}
        for chunk in shard.chunks(hidden):
            logits = shard.whole_rows(hidden[chunk]) @ weight.t()
            if shard.keeps:
                ctx.logits[chunk.start] = logits
            peak, total, picked = shard.statistics(logits, shard.by_shard(labels)[:, chunk].reshape(-1))
            for whole, part in ((losses, total.log() + peak - picked), (peaks, peak), (totals, total)):
                target = shard.by_shard(whole)[:, chunk]
                target.copy_(part.view_as(target))
        ctx.shard = shard
        # Megatron's protocol: the buffer of this micro-batch's model chunk, not a saved tensor of autograd's.
        ctx.main_grad = weight.main_grad if shard.fused else None
        ctx.save_for_backward(hidden, weight, labels, peaks, totals)
        return losses.t().contiguous()

    @staticmethod
    def backward(ctx: FunctionCtx, d_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """d logits = (softmax(logits) - onehot(label)) * d loss * scale."""
        hidden, weight, labels, peaks, totals = ctx.saved_tensors
        shard: OutputShard = ctx.shard
        d_losses = d_losses.t().contiguous()
        d_hidden = torch.empty_like(hidden)
        d_weight = ctx.main_grad
        if d_weight is None and ctx.needs_input_grad[1]:
            # Chunks are summed in float32: a sum in 16 bits would round once a chunk.
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for chunk in shard.chunks(hidden):
            rows = shard.whole_rows(hidden[chunk])
            label, peak, total, d_loss = (
                shard.by_shard(tensor)[:, chunk].reshape(-1) for tensor in (labels, peaks, totals, d_losses)
            )
            label = shard.from_first_word(label, weight.shape[0])
            # What is kept becomes the gradients: a second backward pass computes it again.
            logits = ctx.logits.pop(chunk.start, None)
            logits = rows @ weight.t() if logits is None else logits
            d_logits = gradients(logits, label, peak, total, d_loss, shard.scale)
            del logits
            work = shard.return_rows(d_logits @ weight, d_hidden[chunk])
            if ctx.needs_input_grad[1]:
                _add_product(d_weight, d_logits, rows, shard.fused)
            if work is not None:
                work.wait()
        if shard.fused:
            weight.main_grad = ctx.main_grad
            d_weight = in_its_buffer(weight)
        elif d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None


def _add_product(total: Tensor, d_logits: Tensor, rows: Tensor, fused: bool) -> None:
    """total += d_logits^T @ rows; [words, hidden] from [rows, words] and [rows, hidden]."""
    if fused:
        kernels = layers.fused_weight_gradient_mlp_cuda
        float32 = total.dtype == torch.float32
        add = kernels.wgrad_gemm_accum_fp32 if float32 else kernels.wgrad_gemm_accum_fp16
        add(rows, d_logits, total)
    else:
        add_product(rows, d_logits, total)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: int,
    group: dist.ProcessGroup,
    *,
    sequence_parallel: bool = False,
    scale: float = 1.0,
    fused: bool = False,
    keeps: bool = False,
) -> Tensor:
    """Cross-entropy of every token, from its hidden state.

    Args:
        hidden: [n, batch, hidden], or [n / tp, batch, hidden] with sequence parallelism.
        weight: [words / tp, hidden], the rank's part of the output layer.
        labels: int64 [batch, n], words of the whole vocabulary.
        rows: tokens whose logits exist at a time on this rank; at least a position of each row shard and sample.
        group: tensor-parallel group.
        scale: factor of the logits.
        fused: add the weight's gradient to `weight.main_grad` with Megatron's kernel.
        keeps: keep all logits in the dtype of `hidden` until the backward pass, in place of computing them again.

    Returns:
        Float32 [batch, n], in nats.
    """
    fused = fused and weight.requires_grad
    keeps = keeps and torch.is_grad_enabled()
    shard = OutputShard.of(
        hidden, rows, group, sequence_parallel=sequence_parallel, scale=scale, fused=fused, keeps=keeps
    )
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, shard)


def weight_of(output_layer: ColumnParallelLinear, shared: Tensor | None) -> Tensor:
    """The weight of the output layer, for a product that is not a call of the layer.

    With `--overlap-param-gather`, Megatron's hooks on a module's calls wait until its parameters are gathered. They run
    here, because without them the weight may still be the one before the last step.

    Args:
        output_layer: the layer, which has no weight of its own where the embedding's stands in.
        shared: [words / tp, hidden], the weight in place of the layer's own, or None.

    Returns:
        [words / tp, hidden].
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    return output_layer.weight if shared is None else shared


class ChunkedLoss:
    """Megatron's `output_processor` (an argument of GPTModel's forward): hidden states to losses, in chunks."""

    def __init__(self, loss: LossConfig) -> None:
        self.loss = loss

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        labels: Tensor,
        config: TransformerConfig,
        compute_language_model_loss: Any,
        scale_logits: Any,
        **_unused: Any,
    ) -> Tensor:
        """Losses, float32 [batch, n]; Megatron's own where all tokens go at once. Arguments are GPTModel's."""
        weight = weight_of(output_layer, output_weight)
        tokens, words = labels.numel(), weight.shape[0]
        rows = self.loss.rows_at_a_time(tokens, words)
        keeps = torch.is_grad_enabled() and self.loss.keeps_logits(tokens, words, weight.element_size())
        if keeps:
            # All exist at a time anyway: one chunk adds to the weight's gradient once.
            rows = tokens
        elif rows == tokens:
            logits, _ = output_layer(hidden_states, weight=output_weight)
            return compute_language_model_loss(labels, scale_logits(logits))
        return chunked_cross_entropy(
            hidden_states,
            weight,
            labels,
            rows,
            output_layer.tp_group,
            sequence_parallel=output_layer.sequence_parallel,
            scale=config.mup_output_mult if config.use_mup else 1.0,
            fused=output_layer.gradient_accumulation_fusion and hasattr(weight, "main_grad"),
            keeps=keeps,
        )
