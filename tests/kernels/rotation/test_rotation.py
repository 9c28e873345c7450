"""Norm and rotation of heads: the Triton kernels against the PyTorch reference in float64, and exact angles."""

import logging
import math

import pytest
import torch
import triton
from compare import assert_close
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels import dispatch
from megatron_ksa.kernels.rotation import OP, fixed_point, mix, reference, rotate_heads, triton_rotation

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def frequencies(bases, rotary_dim):
    """int64 [bases, rotary_dim / 2]"""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return fixed_point(torch.stack([base**-exponents for base in bases])).to(DEVICE)


def case(rows=(37, 9), batch=2, heads=(4, 2), dim=16, rotary_dim=16, norm=True, bases=(1e4, 5e5), dtype=torch.float32):
    """Parts as the layer has them, [rows, batch, groups, (queries per group + 2) * dim], and what else is given."""
    generator = torch.Generator().manual_seed(0)
    queries = heads[0] // heads[1]
    shape = (batch, heads[1], (queries + 2) * dim)
    parts = [torch.randn(count, *shape, generator=generator).to(DEVICE, dtype).requires_grad_() for count in rows]
    weights = [torch.rand(dim, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(2 * len(rows))]
    positions = torch.randint(0, 2**20, (sum(rows), batch), generator=generator).to(DEVICE)
    return parts, queries, weights if norm else [], positions, frequencies(bases, rotary_dim)


def results(rotate, parts, queries, weights, positions, freqs, d_dtype=None, **options):
    """Outputs and gradients of all leaves under fixed random gradients, rounded to d_dtype."""
    pairs = list(zip(weights[::2], weights[1::2], strict=True)) or [None] * len(parts)
    out = rotate(parts, queries, pairs, positions, freqs, eps=1e-3, **options)
    generator = torch.Generator().manual_seed(1)
    d_out = [torch.randn(rows.shape, generator=generator).to(rows.device, d_dtype).to(rows.dtype) for rows in out]
    return [*out, *torch.autograd.grad(out, [*parts, *weights], d_out)]


@needs_kernels
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": False},
        {"rotary_dim": 8, "dtype": torch.float16},
        {"dim": 24, "rotary_dim": 24, "heads": (3, 1), "bases": (1e4,)},
        {"rotary_dim": 4, "dim": 20, "heads": (2, 2), "rows": (130,), "batch": 1},
        {"rows": (5, 0)},
        {"dtype": torch.bfloat16},
    ],
    ids="gqa no-norm partial-float16 mqa-dim24 mha-partial-dim20 empty-part bfloat16".split(),
)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_equals_the_reference_in_float64(options, interleaved, zero_centered):
    parts, queries, weights, positions, freqs = case(**options)
    settings = {"interleaved": interleaved, "zero_centered": zero_centered}
    got = results(triton_rotation.rotate, parts, queries, weights, positions, freqs, **settings)
    exact, exact_weights = ([t.detach().double().requires_grad_() for t in leaves] for leaves in (parts, weights))
    expected = results(
        reference.rotate, exact, queries, exact_weights, positions, freqs, d_dtype=parts[0].dtype, **settings
    )
    for index, (actual, wanted) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"result {index}", actual, wanted)


@needs_kernels
def test_positions_of_32_bits_give_the_same_rotation():
    *leaves, positions, freqs = case()
    long, short = (results(triton_rotation.rotate, *leaves, p, freqs) for p in (positions, positions.int()))
    assert all(torch.equal(one, two) for one, two in zip(long, short, strict=True))


@needs_kernels
def test_compiled_call_gives_the_same_bits():
    leaves = case(rows=(9, 3), batch=1)
    compiled = torch.compile(triton_rotation.rotate, backend="aot_eager", fullgraph=True)
    eager, graph = (results(rotate, *leaves) for rotate in (triton_rotation.rotate, compiled))
    assert all(torch.equal(one, two) for one, two in zip(eager, graph, strict=True))


@needs_kernels
@pytest.mark.parametrize("rotate", [reference.rotate, triton_rotation.rotate])
def test_angles_at_the_millionth_position(rotate):
    """1e-3 radians is asked of positions up to 1,048,575; a rotation of (1, 0) is (cos, sin)."""
    dim, positions = 64, torch.tensor([[0], [1], [524287], [1048575]])
    x = torch.cat([torch.ones(4, 1, 1, dim // 2), torch.zeros(4, 1, 1, dim // 2)], dim=-1).to(DEVICE)
    out, *_ = rotate([mix(x, x, x)], 1, [None], positions.to(DEVICE), frequencies((1e4,), dim), eps=0.0)
    theta = positions.double() * 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.atan2(out[:, 0, 0, dim // 2 :], out[:, 0, 0, : dim // 2]).cpu()
    difference = (angle.double() - theta + math.pi) % (2 * math.pi) - math.pi
    assert difference.abs().max() < 1e-6


@needs_kernels
def test_compiles_into_one_graph_and_is_deterministic(monkeypatch):
    monkeypatch.setattr(triton_rotation, "FEWEST_PROGRAMS", 2)
    monkeypatch.setattr(triton_rotation, "MOST_PROGRAMS", 2)
    for options in ({}, {"norm": False}):
        parts, queries, weights, positions, freqs = case(rows=(5, 2), batch=1, **options)
        torch.library.opcheck(
            torch.ops.megatron_ksa.rotate.default,
            (*parts, *(weights or [None] * 4), positions, freqs, queries, 1e-3, False, False),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
    leaves = case(rows=(300,), batch=1)
    one, two = (results(triton_rotation.rotate, *leaves, zero_centered=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    "options, message",
    [({"dtype": torch.float64}, "float64"), ({"bases": (1e4,) * 3}, "3 groups do not fit 2 K/V heads")],
)
def test_refuses_what_it_cannot_compute(options, message):
    with pytest.raises(UsageError, match=message):
        results(triton_rotation.rotate, *case(**options))


def test_dispatch_says_once_what_it_takes(caplog):
    dispatch._announce.cache_clear()
    parts, queries, _, positions, freqs = case(norm=False)
    parts, positions, freqs = [part.detach().cpu() for part in parts], positions.cpu(), freqs.cpu()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            rotate_heads(parts, queries, [None] * 2, positions, freqs, eps=0.0)
    message = f"{OP} runs in plain PyTorch (cpu, torch.float32)"
    assert [record.message for record in caplog.records] == [message]
