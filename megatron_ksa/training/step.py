"""One forward step of pretraining: batch, model, masked language-model loss."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_ksa.config.settings import RunSettings
from megatron_ksa.model.chunked_loss import ChunkedLoss
from megatron_ksa.training.batch import get_batch


def masked_loss(
    loss_mask: Tensor, losses: Tensor, *, check_for_nan: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked token losses.

    Args:
        loss_mask: float32 [batch, n].
        losses: [batch, n], one cross-entropy a token, in nats.
        check_for_nan: let Megatron's rerun state machine stop at a NaN or infinite loss.

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
    report = torch.cat([loss.detach().clone().view(1), num_tokens.detach().clone().view(1)])
    return loss, num_tokens, {"lm loss": report}


class ForwardStep:
    """The forward step that `pretrain` calls for every micro-batch."""

    def __init__(self, args: argparse.Namespace, settings: RunSettings) -> None:
        self.args = args
        self.settings = settings
        self.loss = ChunkedLoss(settings.loss)

    def __call__(self, data_iterator: Iterator | None, model: MegatronModule) -> tuple[Tensor, Callable]:
        """Losses [batch, n] on the last pipeline stage (hidden states before it), and the loss function."""
        batch = get_batch(data_iterator, self.args, get_attr_wrapped_model(model, "vp_stage"))
        if self.settings.ksa.anneal_start is not None:
            set_coefficient = get_attr_wrapped_model(model, "set_summary_coefficient")
            set_coefficient(self.settings.ksa.summary_coefficient(self.args.curr_iteration))
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            output_processor=self.loss,
        )
        return output, partial(masked_loss, batch.loss_mask, check_for_nan=self.args.check_for_nan_in_loss_and_grad)
