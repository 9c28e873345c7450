"""Losses and gradients are checked for NaN once an iteration, in place of wherever they are formed.

Megatron 0.19.2 looks at each micro-batch's loss and at the norm of each bucket's gradients at once: the host waits for
the device four times and more an iteration, and then launches into an idle device. At 8k tokens the 1.9B model's
iteration took 252.6 ms on an H100 with those checks and 233.5 ms without (examples/throughput_1b9/step_parts.py); the
check's own kernels are 3 ms of it. Here the values are kept until forward and backward passes are launched, and looked
at together, before the optimizer changes anything.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ksa.kernels.dispatch import fuses
from megatron_ksa.upstream.patches import Patch
from megatron_ksa.upstream.trainer import TRAIN_STEP

# Conditions that only numbers that are not finite meet.
NOT_FINITE = (torch.isnan, torch.isinf)


class LateChecks:
    """Calls of the rerun state machine's `validate_result` that wait for the end of an iteration's passes."""

    def __init__(self) -> None:
        self.collects = False
        self.waiting: list[Callable[..., None]] = []
        self.results: list[Tensor] = []

    def validate_result(self, original: Callable) -> Callable:
        """The machine's method: put off where it only asks whether a number is finite."""

        @functools.wraps(original)
        def validate_result(
            machine: Any, result: Any, rejection_func: Callable, message: str,
            comparison_func: Callable | None = None, tolerance: float = 0.0, fatal: bool = True,
        ) -> None:  # fmt: skip
            if not self.collects or rejection_func not in NOT_FINITE or not isinstance(result, Tensor):
                original(machine, result, rejection_func, message, comparison_func, tolerance, fatal)
                return
            # The loss would keep what its backward pass has saved.
            result = result.detach()
            self.results.append(result)
            self.waiting.append(
                lambda reject: original(
                    machine, result, reject or rejection_func, message, comparison_func, tolerance, fatal
                )
            )

        return validate_result

    def train_step(self, original: Callable) -> Callable:
        """Megatron's `train_step` with `forward_backward_func` between the first and the last look."""
        names = inspect.signature(original)

        @functools.wraps(original)
        def train_step(*args: Any, **options: Any) -> tuple:
            call = names.bind(*args, **options)
            call.arguments["forward_backward_func"] = self._checked(call.arguments["forward_backward_func"])
            return original(*call.args, **call.kwargs)

        return train_step

    def _checked(self, passes: Callable) -> Callable:
        @functools.wraps(passes)
        def run(*args: Any, **options: Any) -> Any:
            self.collects = fuses("checks")
            try:
                result = passes(*args, **options)
                self.collects = False
                self._look()
            finally:
                self.collects = False
                self.waiting.clear()
                self.results.clear()
            return result

        return run

    def _look(self) -> None:
        """Make the calls in their order; the device is asked once where every number is finite."""
        if not self.waiting:
            return
        numbers = torch.stack([result.float().reshape(()) for result in self.results])
        finite = bool(numbers.isfinite().all())
        for call in self.waiting:
            # The machine counts calls and injects faults whatever the answer is.
            call(_accept if finite else None)


def _accept(result: Tensor) -> bool:
    return False


VALIDATE_RESULT = Patch(
    "megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
    lambda original, wrap: wrap(original),
    why="the host waits for the device wherever a loss or a bucket of gradients is formed",
    expects="(self, result, rejection_func, message, comparison_func=None, tolerance=0.0, fatal=True)",
)
PATCHES = (VALIDATE_RESULT,)


def patches(checks: bool) -> tuple[Patch, ...]:
    """Patches for a run that checks losses and gradients, with a common `LateChecks`; none for another run."""
    if not checks:
        return ()
    late = LateChecks()
    return VALIDATE_RESULT.given(late.validate_result), TRAIN_STEP.given(late.train_step)
