"""Kernels that no GPU has run yet: a GPU takes plain PyTorch until `--kernels-unchecked` asks for them."""

import argparse

import pytest
import torch

from megatron_ksa.config.kernels import FUSIONS, UNCHECKED, KernelConfig
from megatron_ksa.kernels import dispatch
from megatron_ksa.training import configure


@pytest.fixture(params=[False, True])
def taken(request):
    dispatch.take_unchecked(request.param)
    yield request.param
    dispatch.take_unchecked()


@pytest.mark.parametrize("checked", [False, True])
def test_an_op_takes_its_kernels(taken, checked, monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda op, rows: True)
    monkeypatch.setattr(dispatch, "_implementation", lambda path: lambda rows: path)
    op = dispatch.by_device("doubling", "kernels:double", checked=checked)(lambda rows: "reference")
    assert op(torch.ones(1)) == ("kernels:double" if checked or taken else "reference")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("unchecked", [False, True])
def test_fusions_of_a_run(on_gpu, unchecked, monkeypatch):
    monkeypatch.setattr(configure.torch.cuda, "is_available", lambda: on_gpu)
    args = argparse.Namespace(cuda_graph_impl="none", reuse_grad_buf_for_mxfp8_param_ag=False)
    settings = argparse.Namespace(kernels=KernelConfig(apart=("norm",), unchecked=unchecked))
    expected = {"norm"} | (UNCHECKED if on_gpu and not unchecked else set())
    assert configure._apart(args, settings) == expected
    assert UNCHECKED.issubset(FUSIONS)
