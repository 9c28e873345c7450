"""Comparison of an op with its definition in float64: no op that fails it is timed."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_ksa.kernels.benchmarks.registry import Case, Op

# ||a - b|| / ||b|| against float64, as in tests/compare.py.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def ratio(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; infinite where actual is not finite or nothing is expected but given."""
    if not torch.isfinite(actual).all():
        return float("inf")
    scale, difference = expected.double().norm().item(), (actual.double() - expected.double()).norm().item()
    return difference / scale if scale else (float("inf") if difference else 0.0)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element nobody writes is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def errors(
    names: tuple[str, ...], run: Callable, expected: Callable, leaves: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Relative errors of outputs and gradients of `run` against `expected` in float64, each with its limit.

    The last entry, `repeat`, is 0 if a second backward pass gives the same bits; it has no limit.
    """
    outputs = run(*leaves)
    d_outputs = [torch.randn_like(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, d_outputs)
    again = torch.autograd.grad(run(*leaves), leaves, d_outputs)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = expected(*exact_leaves)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, [d_out.double() for d_out in d_outputs])
    results = zip(names, (*outputs, *gradients), (*exact, *exact_gradients), strict=True)
    found = {name: (ratio(a.detach(), b.detach()), TOLERANCE[a.dtype]) for name, a, b in results}
    same = all(torch.equal(one, two) for one, two in zip(gradients, again, strict=True))
    return found | {"repeat": (0.0 if same else float("inf"), float("inf"))}


def check_case(case: Case) -> dict[str, tuple[float, float]]:
    """Errors and limits of a case's outputs and gradients."""
    return errors(case.names, case.run, case.expected, case.leaves)


def check_op(op: Op, device: str, features: bool = True) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Errors by case and entry, and what is out of tolerance; an exception is out of tolerance too.

    Args:
        features: check the op's features too, which the shapes that are timed may not have.
    """
    found: dict[str, dict] = {}
    failed: list[str] = []
    with poisoned_memory() if op.poisoned else contextlib.nullcontext():
        for shape in op.check_shapes(device):
            try:
                found[str(shape)] = check_case(op.prepare(shape, device))
            except Exception as error:  # any library may be missing or refuse: the op is then not timed
                found[str(shape)] = {"error": repr(error)[:500]}
        if features and op.features is not None:
            found |= op.features(device)
    for case, entries in found.items():
        if "error" in entries:
            failed.append(f"{op.name} {case}: {entries['error']}")
            continue
        failed += [f"{op.name} {case} {name}" for name, (error, limit) in entries.items() if not error <= limit]
        found[case] = {name: error for name, (error, _) in entries.items()}
    return found, failed
