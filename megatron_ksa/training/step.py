"""One forward step of pretraining: batch, model, masked language-model loss."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, unwrap_model
from megatron.training import get_timers
from megatron.training.distillation import LossFuncCallable
from torch import Tensor

from megatron_ksa.config.settings import RunSettings
from megatron_ksa.missing_ranks import Progress
from megatron_ksa.model.chunked_loss import ChunkedLoss
from megatron_ksa.model.distillation_loss import DistillationLoss
from megatron_ksa.training.annealing import is_annealed_in_graphs
from megatron_ksa.training.batch import get_batch
from megatron_ksa.training.step_log import StepLog

# A loss this many times the largest seen is a spike, as in Megatron's own pretraining script.
SPIKE = 10


def masked_loss(
    loss_mask: Tensor, losses: Tensor, *, check_for_nan: bool = False, check_for_spikes: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked token losses.

    Args:
        loss_mask: float32 [batch, n].
        losses: [batch, n], one cross-entropy a token, in nats.
        check_for_nan: let Megatron's rerun state machine stop at a NaN or infinite loss.
        check_for_spikes: let it run an iteration again whose loss is far above the largest so far.

    Returns:
        The summed loss, the number of unmasked tokens (int32), and {"lm loss": float32 [summed loss, tokens]}.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    if check_for_nan:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if check_for_spikes:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message="spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.cat([loss.detach().clone().view(1), num_tokens.detach().clone().view(1)])
    return loss, num_tokens, {"lm loss": report}


def distillation_loss(
    loss_mask: Tensor,
    losses: tuple[Tensor, Tensor, Tensor],
    *,
    check_for_nan: bool = False,
    check_for_spikes: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`masked_loss` of distillation, with both terms in the report.

    Args:
        losses: of each token, [batch, n]: the weighted sum, cross-entropy, divergence (see `TokenLosses`).
    """
    total, cross_entropy, divergence = losses
    loss, num_tokens, _ = masked_loss(
        loss_mask, total, check_for_nan=check_for_nan, check_for_spikes=check_for_spikes
    )  # fmt: skip
    terms = {"lm loss": cross_entropy, "kl loss": divergence}
    return loss, num_tokens, {
        name: torch.stack([(term.float() * loss_mask).sum(), num_tokens]) for name, term in terms.items()
    }  # fmt: skip


def _scale_of_means(chunk: MegatronModule) -> Tensor:
    """What Megatron's schedules multiply a micro-batch's mean loss by before its backward pass, float32 []."""
    scale = torch.ones((), device=next(chunk.parameters()).device)
    if chunk.config.grad_scale_func is not None:
        scale = chunk.config.grad_scale_func(scale).reshape(())
    return scale / get_num_microbatches()


class ForwardStep:
    """The forward step that `pretrain` calls for every micro-batch.

    Attributes:
        log: knows the model chunks once they have run.
    """

    def __init__(self, args: argparse.Namespace, settings: RunSettings, progress: Progress | None = None) -> None:
        """Take the flags and settings.

        Args:
            progress: told where this rank is, for the others.
        """
        self.args, self.progress = args, progress or Progress()
        self.settings = settings
        self.log = StepLog(settings)
        self.loss, self.reduce = ChunkedLoss(settings.loss), masked_loss
        if settings.distill.enabled:
            self.loss, self.reduce = DistillationLoss(settings.loss, settings.distill), distillation_loss
        self.cached_logits = cached_logits_loss(args) if args.logits_load_dir else None
        # Set with the first step: an error before it is one of the set-up.
        self.started = False
        # `--log-straggler`; one object a process, which Megatron's trainer configures.
        self.straggler_timer = StragglerDetector()

    def _loss_function(self, loss_mask: Tensor | None, model: MegatronModule) -> Callable:
        args = self.args
        if self.cached_logits is not None:
            return partial(self.cached_logits, loss_mask, model=model)
        checks = {"check_for_nan": args.check_for_nan_in_loss_and_grad, "check_for_spikes": args.check_for_spiky_loss}
        return partial(self.reduce, loss_mask, **checks)

    def __call__(
        self, data_iterator: Iterator | None, model: MegatronModule, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable]:
        """Losses [batch, n] on the last pipeline stage (hidden states before it), and the loss function.

        Args:
            return_schedule_plan: `--overlap-moe-expert-parallel-comm` asks for the parts of the forward pass instead.
        """
        self.started = True
        self.progress.at(self.args.curr_iteration)
        if data_iterator is not None:
            data_iterator = self.progress.reading(data_iterator)
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        with self.straggler_timer(bdata=True):
            batch = get_batch(data_iterator, self.args, get_attr_wrapped_model(model, "vp_stage"))
        timers("batch-generator").stop()
        ksa, watched = self.settings.ksa, contextlib.nullcontext()
        if ksa.enabled:
            chunk = unwrap_model(model)
            watched = self.log.watch(chunk)
            changes = ksa.anneal_start is not None or ksa.initial_coefficient not in (None, 1)
            # Graphs read what is written between iterations; a run that only evaluates has none.
            written = is_annealed_in_graphs(self.args, ksa) and chunk.graphs_coefficient is not None
            if changes and not written:
                chunk.set_summary_coefficient(ksa.summary_coefficient(self.args.curr_iteration))
            if chunk.distillation is not None:
                chunk.distillation.set_scale(_scale_of_means(chunk))
        run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
        with watched, self.straggler_timer:
            output = run(
                batch.tokens,
                batch.position_ids,
                batch.attention_mask,
                labels=batch.labels,
                loss_mask=batch.loss_mask,
                output_processor=self.loss,
            )
        return output, self._loss_function(batch.loss_mask, model)


def cached_logits_loss(args: argparse.Namespace) -> LossFuncCallable:
    """`--logits-load-dir`: Megatron's loss on a teacher's stored log-probabilities, mixed into the language model's."""
    return LossFuncCallable(
        logprobs_dir=args.logits_load_dir,
        decode_threads=args.logits_load_decode_threads,
        prefetch_factor=args.logits_load_prefetch_factor,
        kd_loss_alpha=args.logits_load_kd_loss_alpha,
        ignore_errors=args.logits_load_ignore_errors,
        msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
    )
