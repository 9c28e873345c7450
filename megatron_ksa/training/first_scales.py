"""FP8 of the recipe `delayed` gets its scales before the first step.

Transformer Engine scales each tensor by the largest value that earlier passes saw, and begins with scales of 1. The
first gradients are far below what E5M2 holds then (2^-16) and become zero: the 1.9B model's first gradient norm was 3.8
in place of 20.8 in 16 bits, and 200 steps later the loss was another one (examples/fp8). Transformer Engine's
calibration (`autocast(calibrating=True)`) looks at inputs and weights, not at gradients.

Here forward and backward passes of the first iteration's batch run before it, and their gradients are dropped. One pass
is not enough: where a product's incoming gradient becomes zero, the products below it in the layer see none (that of an
MLP's first projection comes through its second). A second pass finds theirs, a third one what these add to the
residual stream. Passes are repeated until no scale moves by more than `MOVED`.
"""

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ksa.training.step_log import StepLog
from megatron_ksa.upstream.dropped_passes import repeated, without_trace

# Scales stand still where none grew or shrank by more than this factor: one bit of the exponent.
MOVED = 2.0
MOST_PASSES = 8


class FirstScales:
    """Finds a run's first scales when its first step is about to begin."""

    def __init__(self, args: argparse.Namespace, log: StepLog) -> None:
        self.args, self.log = args, log
        self.looked = False

    def train_step(self, original: Callable) -> Callable:
        """Megatron's `train_step`, whose first call is preceded by passes where scales are missing."""
        names = inspect.signature(original)

        @functools.wraps(original)
        def train_step(*args: Any, **options: Any) -> tuple:
            if not self.looked:
                self.looked = True
                call = names.bind(*args, **options).arguments
                if are_missing(call["model"], starts=self.args.curr_iteration == 0):
                    self._find(call)
            return original(*args, **options)

        return train_step

    def _find(self, call: dict[str, Any]) -> None:
        number = self._run_passes(call)
        if torch.distributed.get_rank() == 0:
            print(
                f"FP8, delayed: scales come from {number} passes over the first batch before the first step", flush=True
            )

    def _run_passes(self, call: dict[str, Any]) -> int:
        """Repeat the first step's passes until scales stand still; returns how many there were.

        Gradients are left for the step, which begins by zeroing them.
        """
        chunks, optimizer, passes = call["model"], call["optimizer"], call["forward_backward_func"]
        if isinstance(passes, FullCudaGraphWrapper):
            # It counts its calls, and captures one of them.
            passes = passes.forward_backward_func
        data, iterators = repeated(call["data_iterator"])
        before: Tensor | None = None
        number, moves = 0, True
        with without_trace(chunks):
            while moves and number < MOST_PASSES:
                number += 1
                for chunk in chunks:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                for iterator in iterators:
                    iterator.rewind()
                passes(
                    forward_step_func=call["forward_step_func"],
                    data_iterator=data,
                    model=chunks,
                    num_microbatches=get_num_microbatches(),
                    seq_length=self.args.seq_length,
                    micro_batch_size=self.args.micro_batch_size,
                    decoder_seq_length=self.args.decoder_seq_length,
                    forward_only=False,
                    p2p_communicator=call.get("p2p_communicator"),
                    pg_collection=call.get("pg_collection"),
                )
                now = torch.cat([torch.ones(1, device=torch.cuda.current_device()), *scales(chunks)])
                (moves,) = _on_any_rank(_moved(before, now))
                before = now
        for iterator in iterators:
            iterator.give_back()
        # What the passes added to the next line of the log.
        self.log.take(self.args.curr_iteration + 1)
        return number


def are_missing(chunks: list[MegatronModule], *, starts: bool) -> bool:
    """Whether a run needs passes for its scales; the same on all ranks.

    Args:
        starts: training begins. Where it goes on, a product without scales among others that have some was never in
            FP8 (summaries that no row sees), and what was trained in FP8 goes on exactly.
    """
    known = [_has_scales(metas) for metas in _metas(chunks)]
    has_some, lacks_some = _on_any_rank(any(known), not all(known))
    return lacks_some and (starts or not has_some)


def scales(chunks: list[MegatronModule]) -> list[Tensor]:
    """Copies of all scales, float32, of products that have run in FP8 or were loaded."""
    return [state.scale.detach().flatten().clone() for metas in _metas(chunks) for state in _states(metas)]


def _metas(chunks: list[MegatronModule]) -> Iterator[dict[str, Any]]:
    """`fp8_meta` of every module of Transformer Engine that multiplies by a weight."""
    for chunk in chunks:
        for module in chunk.modules():
            metas = getattr(module, "fp8_meta", None)
            if isinstance(metas, dict) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                yield metas


def _states(metas: dict[str, Any]) -> list[Any]:
    """Scales and largest values of the forward pass and of the backward pass, where there are any."""
    states = (metas.get(key) for key in ("scaling_fwd", "scaling_bwd"))
    return [state for state in states if hasattr(state, "amax_history")]


def _has_scales(metas: dict[str, Any]) -> bool:
    """Whether any is not as Transformer Engine makes it; a history of one value is zero between two passes."""
    return any(bool((state.scale != 1).any()) or bool(state.amax_history.any()) for state in _states(metas))


def _moved(before: Tensor | None, now: Tensor) -> bool:
    if before is None or before.shape != now.shape:
        return True
    return bool(((now / before).log2().abs() > torch.tensor(MOVED).log2().item()).any())


def _on_any_rank(*conditions: bool) -> list[bool]:
    """Each condition, where it holds on one rank or more of the whole run."""
    flags = torch.tensor(conditions, dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
