"""Attention of a decoding step in a KSA layer and in a full layer, by the bytes of keys and values that it reads."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ksa.kernels.benchmarks.check import TOLERANCE, ratio
from megatron_ksa.kernels.benchmarks.registry import Case, Op, Shape, small_shapes
from megatron_ksa.kernels.ksa_decode import CacheGeometry, reference, triton_decode

STEP, WITH_SUMMARIES = "step", "step_with_summaries"


def ksa_geometry(shape: Shape) -> CacheGeometry:
    """A KSA layer's cache of n tokens."""
    ring = min((shape.window_chunks + 1) * shape.chunk_size, -(-shape.n // shape.chunk_size) * shape.chunk_size)
    return CacheGeometry(shape.chunk_size, shape.summary_tokens, ring, shape.summary_rows)


def full_geometry(shape: Shape) -> CacheGeometry:
    """A full layer's cache of n tokens."""
    return CacheGeometry(1, 0, shape.n, 0)


def _tensors(shape: Shape, geometry: CacheGeometry, rows: int, device: str) -> tuple:
    """Arguments of a step after which every sequence has n tokens."""
    q, k, v = (
        torch.randn(rows, shape.batch, heads, shape.head_dim, device=device).to(shape.torch_dtype)
        for heads in (shape.heads, shape.groups, shape.groups)
    )
    cache_shape = (shape.batch, shape.groups, geometry.rows, shape.head_dim)
    caches = [torch.randn(cache_shape, device=device, dtype=shape.torch_dtype) for _ in range(2)]
    slots = torch.arange(shape.batch, device=device)
    return q, k, v, *caches, slots, torch.full_like(slots, shape.n - 1), geometry


def _read_bytes(shape: Shape, geometry: CacheGeometry) -> float:
    """Bytes of keys and values that the text queries of a step see."""
    seen, hidden = geometry.visible(shape.n - 1)
    rows = seen - int(hidden.sum())
    return 2.0 * shape.batch * shape.groups * rows * shape.head_dim * shape.torch_dtype.itemsize


def _prepare(geometry_of: Callable[[Shape], CacheGeometry]) -> Callable[[Shape, str], Case]:
    def prepare(shape: Shape, device: str) -> Case:
        geometry = geometry_of(shape)
        steps = {STEP: _tensors(shape, geometry, 1, device)}
        if geometry.summary_tokens:
            steps[WITH_SUMMARIES] = (*_tensors(shape, geometry, 1 + shape.summary_tokens, device)[:3], *steps[STEP][3:])
        read = _read_bytes(shape, geometry)
        return Case(
            [], lambda: (),
            modes={name: lambda step=step: triton_decode.decode_attention(*step) for name, step in steps.items()},
            moved_bytes=dict.fromkeys(steps, read), facts={"key_value_bytes": read},
        )  # fmt: skip

    return prepare


def _errors(geometry_of: Callable[[Shape], CacheGeometry]) -> Callable[[str], dict]:
    """Output of steps of small shapes against the reference in float64; there is no backward pass."""

    def errors(device: str) -> dict[str, dict[str, tuple[float, float]]]:
        found = {}
        for shape in small_shapes(device, (4, 4), (4, 2)):
            geometry = geometry_of(shape)
            rows = 1 + (shape.summary_tokens if geometry.summary_tokens else 0)
            tensors = _tensors(shape, geometry, rows, device)
            exact: list = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]
            error = ratio(triton_decode.decode_attention(*tensors), reference.decode_attention(*exact))
            found[str(shape)] = {"out": (error, TOLERANCE[shape.torch_dtype])}
        return found

    return errors


DECODES = [
    Op(f"decode_{name}", f"attention of a decoding step, {name} layer", _prepare(geometry), features=_errors(geometry))
    for name, geometry in (("ksa", ksa_geometry), ("full", full_geometry))
]
