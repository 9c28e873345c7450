"""Norm and rotation of projected heads (one base, HARPE's base for each K/V group), and a device copy."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ksa.kernels.benchmarks.registry import BACKWARD, BOTH, FORWARD, Case, Op, Shape, small_shapes
from megatron_ksa.kernels.rotation import fixed_point, reference, triton_rotation

EPS = 1e-5
BASES = (1e6, 5e6)


def frequencies(shape: Shape, harpe: bool, device: str) -> Tensor:
    """int64 [K/V groups or 1, head_dim / 2]"""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    bases = torch.linspace(*BASES, shape.groups).double() if harpe else torch.tensor([BASES[0]]).double()
    return fixed_point(bases[:, None] ** -exponents).to(device)


def _rotation(harpe: bool, norm: bool) -> Callable[[Shape, str], Case]:
    def prepare(shape: Shape, device: str) -> Case:
        # Rows first, as the layer has them; positions beyond 2^19 show that angles are exact there.
        queries = shape.heads // shape.groups
        values = torch.randn(shape.rows, shape.batch, shape.groups, (queries + 2) * shape.head_dim, device=device)
        mixed = values.to(shape.torch_dtype).requires_grad_()
        weights = [
            torch.rand(shape.head_dim, device=device).to(shape.torch_dtype).requires_grad_() for _ in range(2 * norm)
        ]
        positions = torch.arange(shape.rows, device=device)[:, None] + 2**19
        freqs = frequencies(shape, harpe, device)

        def by(rotate: Callable) -> Callable:
            def run(mixed: Tensor, *pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return rotate([mixed], queries, [pair or None], positions, freqs, eps=EPS)

            return run

        names = ("query", "key", "value", "dmixed", *("dquery_weight", "dkey_weight")[: 2 * norm])
        size = mixed.numel() * mixed.element_size()
        # With a norm the backward pass reads the heads as well as their gradients.
        moved = {FORWARD: 2.0 * size, BACKWARD: (3.0 if norm else 2.0) * size}
        return Case(
            [mixed, *weights], by(triton_rotation.rotate), by(reference.rotate), names, (FORWARD, BACKWARD, BOTH),
            moved_bytes=moved | {BOTH: sum(moved.values())}, needed_bytes=2 * size,
        )  # fmt: skip

    return prepare


def _copy(shape: Shape, device: str) -> Case:
    """Copies as many bytes as a rotation without a norm reads."""
    source = shape.random(shape.rows, shape.heads + 2 * shape.groups, device).detach()
    target = torch.empty_like(source)
    moved = {FORWARD: 2.0 * source.numel() * source.element_size()}
    return Case(
        [source.requires_grad_()], lambda rows: (rows.clone(),), lambda rows: (rows.clone(),), ("out", "gradient"),
        {FORWARD: lambda: target.copy_(source.detach())}, moved_bytes=moved,
    )  # fmt: skip


def _check_shapes(device: str) -> list[Shape]:
    return small_shapes(device, (4, 4), (4, 2))


COPY = Op("copy", "device copy of the bytes of query, key and value heads", _copy, _check_shapes)
ROTATIONS = [
    Op(f"rotation_{name}{'_norm' * norm}", f"{what}{', with Q/K norm' * norm}", _rotation(harpe, norm), _check_shapes)
    for norm in (False, True)
    for name, what, harpe in (("rope", "rotation, one base", False), ("harpe", "rotation, a base for each group", True))
]
