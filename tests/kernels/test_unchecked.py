"""A kernel or fusion that no GPU has run yet: a GPU takes plain PyTorch until `take_unchecked` asks for it."""

import pytest
import torch

from megatron_ksa.config.kernels import FUSIONS
from megatron_ksa.kernels import adam, column_sums, dispatch, embedding_gradient, softmax_merge, swiglu, unchecked


@pytest.fixture(params=[False, True])
def taken(request, monkeypatch):
    """Whether unchecked kernels are taken, with an op and a fusion that are."""
    monkeypatch.setattr(unchecked, "OPS", frozenset({"SwiGLU"}))
    monkeypatch.setattr(unchecked, "FUSIONS", frozenset({"activation", "residual"}))
    unchecked.take_unchecked(request.param)
    yield request.param
    unchecked.take_unchecked()


class OnGPU:
    """Rows as `uses_triton` sees those of a GPU."""

    is_cuda, dtype, device = True, torch.float32, torch.device("cuda")


@pytest.mark.parametrize("op", ["attention", "SwiGLU"])
def test_an_op_takes_its_kernels(taken, op, monkeypatch):
    monkeypatch.setattr(dispatch, "_implementation", lambda path: lambda rows: path)
    run = dispatch.by_device(op, "kernels:double")(lambda rows: "reference")
    assert run([OnGPU()]) == ("kernels:double" if op == "attention" or taken else "reference")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_fusion_is_on(taken, on_gpu, monkeypatch):
    """Only the trainer turned unchecked fusions off: whoever used the model without it got them on a GPU."""
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: on_gpu)
    for name in FUSIONS:
        assert dispatch.fuses(name) == (taken or not on_gpu or name not in unchecked.FUSIONS)


def test_every_name_is_a_fusion_or_an_op():
    """A name that nothing has would check nothing."""
    assert unchecked.FUSIONS.issubset(FUSIONS)
    ops = (adam, column_sums, embedding_gradient, softmax_merge, swiglu)
    assert unchecked.OPS.issubset(each.OP for each in ops)
