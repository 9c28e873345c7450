"""The attention term of distillation: a layer's attention output against the teacher's, in the student's backward pass.

The term of a layer does not reach the loss as a sum: its gradient is added to that of the layer's attention output when
the backward pass comes by, as Megatron adds the auxiliary losses of its experts. So neither activation recompute nor
pipeline stages have anything to hand on.
"""

import functools
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_ksa.config.distill import DistillConfig

# Text rows whose differences exist in float32 at a time.
CHUNK_ROWS = 4096
EPSILON = 1e-6


def row_terms(student: Tensor, teacher: Tensor, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Both terms of each row.

    Args:
        student, teacher: [rows, hidden], attention output after the output projection.

    Returns:
        mean over the row's elements of min((o_S - o_T)^2, clamp), and 1 - cos(o_S, o_T); [rows] each. With
        `config.normalize`, o / (sqrt(mean(o^2)) + 1e-6) takes o's place, the mean over the row.
    """
    if config.normalize:
        student, teacher = (o / (o.square().mean(-1, keepdim=True).sqrt() + EPSILON) for o in (student, teacher))
    squared = (student - teacher).square().clamp(max=config.clamp).mean(-1)
    if not config.cosine_weight:
        return squared, torch.zeros_like(squared)
    return squared, 1.0 - torch.cosine_similarity(student, teacher, dim=-1)


class AttentionTerm:
    """The term of one layer, averaged over the micro-batches since `take`.

    A micro-batch's teacher output is kept, on the GPU or with `config.offload` in host memory, until it is compared:
    when the student's layer has run, or, with activation recompute, when the backward pass computes the layer again.
    Backward passes come in the order of the forward passes.

    Attributes:
        config: weights and clamp.
        num_layers: KSA layers of the whole model.
        row_shards: tensor-parallel ranks that divide the rows (sequence parallelism).
        scale: factor of the term's mean in the loss whose gradient the backward pass computes; set for every
            micro-batch (loss scale / number of micro-batches).
    """

    def __init__(self, config: DistillConfig, num_layers: int, row_shards: int = 1) -> None:
        self.config, self.num_layers, self.row_shards = config, num_layers, row_shards
        self.scale: Tensor | float = 1.0
        self.teacher: deque[Callable[[], Tensor]] = deque()
        # True in the teacher's pass; and whether a backward pass follows the pass that runs.
        self.is_teacher = self.trains = False
        self.sums: Tensor | None = None
        self.count = 0

    def __call__(self, output: Tensor, bias: Tensor | None, text_rows: int) -> Tensor:
        """The attention output, with the term's gradient in the student's backward pass.

        Args:
            output: [rows of the shard, batch, hidden], text rows first.
            bias: [hidden], what the layer adds to it later, or None.
            text_rows: text rows of the shard.
        """
        if not self.trains:
            return output
        if self.is_teacher:
            self.teacher.append(_on_host(output) if self.config.offload else lambda: output)
            return output.clone()  # without gradients Megatron adds the residual in place
        if not torch.is_grad_enabled():
            return output  # to be recomputed
        return _Compare.apply(output, bias, self.teacher.popleft()(), text_rows, self)

    def compare(self, student: Tensor, teacher: Tensor, bias: Tensor | None) -> Tensor:
        """Count the layer's terms, and return the gradient of their weighted sum over rows, times hidden.

        Without that factor float16 would lose small differences.

        Args:
            student, teacher: [text rows, batch, hidden].

        Returns:
            [text rows, batch, hidden] in the dtype of `student`.
        """
        config, gradient = self.config, torch.empty_like(student)
        dtype = torch.promote_types(student.dtype, torch.float32)
        sums = torch.zeros(2, dtype=dtype, device=student.device)
        step = max(CHUNK_ROWS // student.shape[1], 1)
        for begin in range(0, len(student), step):
            rows = slice(begin, begin + step)
            ours, theirs = (part[rows].flatten(0, 1).to(dtype) for part in (student, teacher))
            if bias is not None:
                ours, theirs = ours + bias, theirs + bias
            with torch.enable_grad():
                leaf = ours.detach().requires_grad_()
                terms = torch.stack([part.sum() for part in row_terms(leaf, theirs, config)])
                weighted = config.attention_weight * terms[0] + config.cosine_weight * terms[1]
                (d_rows,) = torch.autograd.grad(weighted, leaf)
            sums += terms.detach()
            gradient[rows] = (d_rows * student.shape[-1]).view_as(student[rows])
        self.sums = sums / student[..., 0].numel() + (0 if self.sums is None else self.sums)
        self.count += 1
        return gradient

    def factor(self, student: Tensor) -> Tensor | float:
        """What `compare`'s gradient is multiplied by: a mean over the rows of all shards and over layers, scaled."""
        return self.scale / (student.numel() * self.row_shards * self.num_layers)

    def take(self) -> Tensor | None:
        """This layer's part of both terms, float32 [2], mean over micro-batches; None where there were none."""
        mean = None if self.sums is None else self.sums.float() / (self.count * self.num_layers)
        self.sums, self.count = None, 0
        return mean


def _on_host(output: Tensor) -> Callable[[], Tensor]:
    """Copy a GPU's tensor to pinned host memory beside what the GPU computes next; what copies it back."""
    if not output.is_cuda:
        return lambda: output
    copies = _copy_stream(output.device)
    copies.wait_stream(torch.cuda.current_stream(output.device))
    # PyTorch's allocator of pinned memory takes a block again when the copies that use it have ended.
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    with torch.cuda.stream(copies):
        host.copy_(output, non_blocking=True)
    output.record_stream(copies)
    copied, device = copies.record_event(), output.device

    def back() -> Tensor:
        torch.cuda.current_stream(device).wait_event(copied)
        return host.to(device, non_blocking=True)

    return back


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies to the host, one a GPU."""
    return torch.cuda.Stream(device)


class _Compare(torch.autograd.Function):
    """The identity on the student's output; its gradient gains that of the term."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, bias: Tensor | None, teacher: Tensor, text_rows: int, term: AttentionTerm
    ) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(term.compare(output[:text_rows], teacher, bias))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: FunctionCtx, d_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = ctx.term.factor(gradient)
        d_output = d_output.clone()
        d_output[: len(gradient)].add_((gradient * factor).to(d_output.dtype))
        return d_output, None, None, None, None
