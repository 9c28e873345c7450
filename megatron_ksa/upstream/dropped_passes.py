"""Forward and backward passes that leave no trace in a run: the step after them is what it would have been."""

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import unwrap_model


class Repeated:
    """Micro-batches that are read from Megatron's iterator once, and given out as often as wanted.

    Megatron's own `rewind` works where the rerun state machine is on and inside its loop; it is off in most runs.
    """

    def __init__(self, source: RerunDataIterator) -> None:
        self.source = source
        self.batches: list[Any] = []
        self.position = 0

    def __iter__(self) -> "Repeated":
        return self

    def __next__(self) -> Any:
        if self.position == len(self.batches):
            self.batches.append(next(self.source))
        self.position += 1
        # As Megatron's: who gets it may change its entries.
        return copy.copy(self.batches[self.position - 1])

    def rewind(self) -> None:
        """Begin with the first micro-batch again."""
        self.position = 0

    def give_back(self) -> None:
        """Let the source give these micro-batches once more, then what follows them."""
        if self.batches:
            self.source.iterable = _Again(self.source, self.batches)


class _Again:
    """Micro-batches before the rest; the rest alone, with its methods, once they are given out."""

    def __init__(self, source: RerunDataIterator, batches: list[Any]) -> None:
        self.source, self.rest, self.batches = source, source.iterable, list(batches)

    def __iter__(self) -> "_Again":
        return self

    def __next__(self) -> Any:
        batch = self.batches.pop(0)
        if not self.batches:
            self.source.iterable = self.rest
        return batch


def repeated(data: Any) -> tuple[Any, list[Repeated]]:
    """What takes the place of a step's `data_iterator`, and the iterators in it.

    Args:
        data: an iterator, None on a rank that reads no data, or a list of these, one a virtual pipeline stage.
    """
    if isinstance(data, list):
        parts = [repeated(part) for part in data]
        return [part for part, _ in parts], [found for _, inner in parts for found in inner]
    if data is None:
        return None, []
    found = Repeated(data)
    return found, [found]


@contextlib.contextmanager
def without_trace(chunks: list[MegatronModule]) -> Iterator[None]:
    """Put back what passes change in a process beyond gradients: random states, buffers, sums of losses to be logged.

    Losses and gradients in it are not looked at: the rerun state machine is between two iterations.
    """
    machine = get_rerun_state_machine()
    buffers = [(buffer, buffer.clone()) for chunk in unwrap_model(chunks) for buffer in chunk.buffers()]
    machine.validate_result = _accept
    try:
        with _random_states_kept():
            yield
    finally:
        del machine.validate_result
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    # Nothing is in these before a run's first step.
    get_moe_metrics_tracker().clear()
    for helper, clean in (
        (MTPLossLoggingHelper, MTPLossLoggingHelper.clean_metrics_in_tracker),
        (DSAIndexerLossLoggingHelper, DSAIndexerLossLoggingHelper.clean_loss_in_tracker),
    ):
        if helper.tracker:
            clean()


def _accept(*unused: Any, **options: Any) -> None:
    """In place of the rerun state machine's `validate_result`."""


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    python, numpy = random.getstate(), np.random.get_state()
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state()
    # Beside CUDA graphs they are generators, which the graphs hold: their contents are kept.
    tracked = {
        name: state.get_state() if isinstance(state, torch.Generator) else state.clone()
        for name, state in tracker.get_states().items()
    }
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state(gpu)
    states = tracker.get_states()
    for name, kept in tracked.items():
        if isinstance(states[name], torch.Generator):
            states[name].set_state(kept)
        else:
            states[name] = kept
    tracker.set_states(states)
