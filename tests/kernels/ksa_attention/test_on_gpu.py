"""KSA attention on a CUDA device: offsets beyond 32 bits, errors beside cuDNN's, memory of the backward pass."""

import pytest
import torch
from compare import assert_close

from megatron_ksa.kernels.benchmarks import attention
from megatron_ksa.kernels.benchmarks.check import errors
from megatron_ksa.kernels.benchmarks.measure import peak_bytes
from megatron_ksa.kernels.benchmarks.registry import Shape
from megatron_ksa.kernels.ksa_attention import KSAGeometry, reference, triton_joint, triton_text, workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Two roundings of the same exact result differ by chance; more than this is another accuracy.
CHANCE = 1.1


@pytest.mark.slow
def test_a_million_rows_are_addressed_exactly():
    """The last rows of 2^20 text rows of 32 heads of 128 channels begin at element 2^32."""
    n, tail, heads, dim, geometry = 2**20, 64, 32, 128, KSAGeometry(8, 1, 128)
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.manual_seed(0)
    counts = ((n, heads), (n, 1), (n, 1), (n // 8, 1), (n // 8, 1))
    leaves = [
        torch.randn(1, rows, count, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for rows, count in counts
    ]
    out, lse = triton_text.text_attention(*leaves, geometry)
    d_out = torch.randn_like(out)
    dq, dk, dv, *_ = torch.autograd.grad(out, leaves, d_out)
    last = slice(n - tail, n)
    exact = [rows.detach().double() for rows in (leaves[0][:, last], *leaves[1:])]
    exact = [rows.requires_grad_() for rows in exact]
    wanted, wanted_lse = reference.text_attention(*exact, geometry, query_start=n - tail)
    # The last text keys are seen by the last queries alone.
    gradients = torch.autograd.grad(wanted, exact[:3], d_out[:, last].double())
    assert_close("out", out[:, last], wanted)
    assert_close("lse", lse[..., last], wanted_lse)
    assert_close("dq", dq[:, last], gradients[0])
    for name, actual, expected in (("dk", dk, gradients[1]), ("dv", dv, gradients[2])):
        assert_close(name, actual[:, last], expected[:, last])
    for rows in (out, lse, dq, dk, dv):
        assert torch.isfinite(rows).all()


def test_errors_are_no_worse_than_cudnns():
    """On causal attention, which both compute, with the same inputs and gradients."""
    torch.manual_seed(0)
    full = attention.FULL.prepare(Shape(2048, 4, 4), "cuda")
    none, everything = full.leaves[1][:, :0].detach(), KSAGeometry(8, 1, 256)

    def ksa(q, k, v):
        return (triton_text.text_attention(q, k, v, none, none, everything)[0],)

    found = []
    for run in (ksa, full.run):
        torch.manual_seed(1)
        found.append(errors(full.names, run, full.expected, full.leaves))
    ours, cudnns = found
    for name in full.names:
        assert ours[name][0] <= CHANCE * cudnns[name][0], f"{name}: {ours[name][0]:.2e}, cuDNN {cudnns[name][0]:.2e}"


@pytest.mark.parametrize("groups", [16, 4])
def test_memory_is_that_of_outputs_and_gradients(groups):
    """Nothing quadratic and no copy of K or V: less than one of them on top, at a length and at twice that.

    Where there are fewer K/V heads than fill the GPU, the float32 parts of as many work items as do come on top,
    whatever the length.
    """
    parts = 0 if groups == 16 else workspace.PROGRAMS * 2 * (2 * 64) * 128 * 4
    for n in (16384, 32768):
        shape = Shape(n, 16, groups)
        leaves = [shape.random(shape.rows, count, "cuda") for count in (16, groups, groups)]
        d_out = torch.randn_like(leaves[0])

        def both(leaves=leaves, d_out=d_out, shape=shape):
            out = triton_joint.attention(*leaves, shape.geometry, text_rows=shape.n)
            torch.autograd.grad(out, leaves, d_out)

        both()
        needed = sum(t.numel() * t.element_size() for t in (leaves[0], *leaves)) + 3 * 4 * shape.rows * 16
        assert peak_bytes(both, "cuda")["peak_over_inputs_bytes"] < needed + parts + leaves[1].numel() * 2


@pytest.mark.parametrize("groups", [4, 2])
def test_a_repeated_call_computes_its_own_tensors(groups):
    """Launches after the first of a kind take the addresses of their call (`kernels/launch.py`)."""
    torch.manual_seed(0)
    shape = Shape(1000, 4, groups, window_chunks=16)
    for _ in range(3):
        leaves = [shape.random(shape.rows, count, "cuda") for count in (4, groups, groups)]
        found = errors(
            ("out", "dq", "dk", "dv"),
            lambda *rows: (triton_joint.attention(*rows, shape.geometry, text_rows=shape.n),),
            lambda *rows: (reference.attention(*rows, shape.geometry, text_rows=shape.n),),
            leaves,
        )
        assert all(error <= limit for error, limit in found.values()), found
