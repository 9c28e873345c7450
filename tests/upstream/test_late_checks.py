"""Checks for NaN that wait for the end of an iteration's passes: the machine sees the calls that it saw before."""

import pytest
import torch

from megatron_ksa.kernels import dispatch
from megatron_ksa.upstream.late_checks import LateChecks


class Machine:
    """Records what `validate_result` of the rerun state machine is asked."""

    def __init__(self):
        self.calls = []

    def validate_result(
        self, result, rejection_func, message, comparison_func=None, tolerance=0.0, fatal=True
    ):  # fmt: skip
        self.calls.append((float(result), message, tolerance, fatal))
        if rejection_func(result) and fatal:
            raise RuntimeError(f"found {message}")


@pytest.fixture
def run():
    """run(losses, apart): what train_step did, in order."""

    def run(losses, apart=()):
        dispatch.take_apart(apart)
        late, machine, order = LateChecks(), Machine(), []
        validate = late.validate_result(Machine.validate_result)

        def passes(scale):
            for loss in losses:
                result = torch.tensor(loss, requires_grad=True) * scale
                for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                    validate(machine, result=result, rejection_func=reject, message=name, tolerance=0.5)
                order.append(f"pass, {len(machine.calls)} checked")
            validate(machine, torch.tensor(9.0), lambda result: float(result) > 1e9, "spiky", fatal=False)
            return "reduced"

        @late.train_step
        def train_step(forward_step_func, forward_backward_func, iteration=None):
            order.append(forward_backward_func(1.0))
            order.append(f"optimizer, {len(machine.calls)} checked")
            return iteration

        try:
            assert train_step(None, passes, iteration=3) == 3
        finally:
            assert not late.waiting and not late.results and not late.collects
            dispatch.take_apart(())
        return order, machine.calls

    return run


def test_they_are_made_before_the_optimizer(run):
    order, calls = run([1.0, 2.0])
    assert order == ["pass, 0 checked", "pass, 0 checked", "reduced", "optimizer, 5 checked"]
    assert calls[0] == (9.0, "spiky", 0.0, False), "what asks for more than a finite number is asked at once"
    assert calls[1:] == [(loss, name, 0.5, True) for loss in (1.0, 2.0) for name in ("NaN", "Inf")]


def test_apart_they_are_made_at_once(run):
    order, calls = run([1.0, 2.0], {"checks"})
    assert order[:2] == ["pass, 2 checked", "pass, 4 checked"] and len(calls) == 5


@pytest.mark.parametrize(("loss", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
@pytest.mark.parametrize("apart", [(), ("checks",)])
def test_a_number_that_is_not_finite_is_found(run, loss, name, apart):
    with pytest.raises(RuntimeError, match=f"found {name}"):
        run([1.0, loss], apart)
