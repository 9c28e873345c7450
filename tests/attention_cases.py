"""What the tests of KSA attention share: packed documents, and a comparison of outputs and gradients with float64."""

from collections.abc import Callable, Sequence

import torch
from compare import assert_close
from torch import Tensor


def document_starts(cuts: Sequence[int], rows: int, batch: int = 1, device: str = "cpu") -> Tensor:
    """int32 [batch, rows]: starts of documents cut at the given positions; every further sample has one cut less."""
    starts = torch.zeros(batch, rows, dtype=torch.int32)
    for sample in range(batch):
        for cut in cuts[sample:]:
            starts[sample, cut:] = cut
    return starts.to(device)


def random_rows(
    seed: int, batch: int, dim: int, dtype: torch.dtype, *counts: tuple[int, int], device: str = "cpu"
) -> list[Tensor]:
    """A leaf [batch, rows, heads, dim] for each (rows, heads)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, rows, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        for rows, heads in counts
    ]


def compare(
    names: Sequence[str], attend: Callable, expected: Callable, leaves: list[Tensor], tolerance: float | None = None
) -> None:
    """Outputs and gradients of `attend` against those of `expected` in float64, under the same random gradients.

    Args:
        names: of the outputs and then of the gradients of the leaves.
        attend, expected: leaves -> outputs. Where a query sees nothing, lse is -inf on both sides.
    """
    outputs = attend(*leaves)
    seen = [torch.isfinite(out) for out in outputs]
    generator = torch.Generator().manual_seed(1)
    d_outputs = [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype) * finite
        for out, finite in zip(outputs, seen, strict=True)
    ]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = expected(*exact_leaves)
    for ours, theirs in zip(seen, exact, strict=True):
        assert torch.equal(ours, torch.isfinite(theirs))
    loss, exact_loss = (
        [out.masked_fill(~finite, 0) for out, finite in zip(results, seen, strict=True)] for results in (outputs, exact)
    )
    gradients = torch.autograd.grad(loss, leaves, d_outputs)
    exact_gradients = torch.autograd.grad(exact_loss, exact_leaves, [d_out.double() for d_out in d_outputs])
    for name, actual, wanted in zip(names, [*loss, *gradients], [*exact_loss, *exact_gradients], strict=True):
        assert_close(name, actual, wanted, tolerance)
