"""Gradient accumulation fusion: the stand-in for apex's module adds what apex's kernel adds."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from compare import assert_close

from megatron_ksa.kernels import weight_gradient
from megatron_ksa.kernels.weight_gradient import add_product
from megatron_ksa.upstream import weight_gradients

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("dtype, total_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_the_product_is_added_to_what_is_there(device, dtype, total_dtype):
    generator = torch.Generator().manual_seed(0)
    rows, d_out = (torch.randn(7, 3, width, generator=generator).to(device, dtype) for width in (16, 24))
    # A slice of a larger buffer, as Megatron's gradient buffers have it.
    total = torch.randn(3 * 24, 16, generator=generator).to(device, total_dtype)[24:48]
    expected = total.double() + d_out.flatten(0, 1).double().t() @ rows.flatten(0, 1).double()
    add_product(rows, d_out, total)
    assert total.is_contiguous()
    assert_close("total", total.to(dtype), expected)


@pytest.mark.slow
def test_megatron_finds_the_stand_in_where_apex_is_missing():
    """In a process of its own, before Megatron is imported; the trainer's tests find it afterwards too."""
    if sys.modules.get(weight_gradients.NAME) is not weight_gradients.MODULE:
        pytest.skip("apex's module is installed")
    assert importlib.util.find_spec(weight_gradients.NAME) is weight_gradients.MODULE.__spec__
    install = (
        "from megatron_ksa.upstream.patches import apply; from megatron_ksa.upstream.weight_gradients import *;"
        "assert patches(); apply(patches());"
    )
    found = (
        "from megatron.core.tensor_parallel import layers;"
        "assert layers._grad_accum_fusion_available;"
        "assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is add_product"
    )
    subprocess.run([sys.executable, "-c", install + found], check=True)


def test_an_installed_module_is_left_alone(monkeypatch):
    installed = type(sys)(weight_gradients.NAME)
    monkeypatch.setitem(sys.modules, weight_gradients.NAME, installed)
    assert weight_gradients.patches() == ()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_product_overwrites_what_counts_as_zeros(device, dtype):
    """What is in the buffer, NaN here, is not read; the second product is added."""
    buffers = weight_gradient.UnwrittenBuffers()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(weight_gradient, "unwritten", buffers)
    try:
        generator = torch.Generator().manual_seed(0)
        rows, d_out = (torch.randn(7, 3, width, generator=generator).to(device, dtype) for width in (16, 24))
        total = torch.zeros(24, 16, device=device)
        assert not buffers.mark(total), "no product was ever written there"
        add_product(rows, d_out, total)
        expected = total.clone()
        assert buffers.mark(total)
        add_product(rows, d_out, total.fill_(float("nan")))
        assert torch.equal(total, expected)
        add_product(rows, d_out, total)
        assert_close("total", total.to(dtype), 2 * expected.double())
        assert buffers.mark(total)
        buffers.fill(total)
        assert not total.any()
        buffers.fill(total.fill_(1.0))
        assert total.all(), "it was written already"
    finally:
        monkeypatch.undo()
