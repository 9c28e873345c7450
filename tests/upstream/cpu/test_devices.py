"""Constructors and moves that put `cuda` tensors on the CPU, replaced by tests/conftest.py as by the trainer."""

import threading

import pytest
import torch
from torch import nn

from megatron_ksa.upstream.cpu.devices import CPU, cpu_for_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is for machines without a GPU")


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, 1, torch.device("cuda"), torch.device("cuda", 2)])
def test_cuda_devices_become_the_cpu(device):
    assert cpu_for_cuda(device) == CPU


@pytest.mark.parametrize(
    "value", ["cpu", "meta", torch.device("meta"), None, True, False, torch.float16, 1.0, "cudart"]
)
def test_everything_else_is_unchanged(value):
    assert cpu_for_cuda(value) is value


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.tensor([1, 2], device=torch.device("cuda", 0)),
        lambda: torch.arange(3, device=torch.cuda.current_device()),
        lambda: torch.empty_like(torch.ones(2), device="cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).cuda(0, non_blocking=True),
        lambda: torch.ones(2).to("cuda:0"),
        lambda: torch.ones(2).to(device="cuda", dtype=torch.float16, non_blocking=True),
        lambda: torch.ones(2).to(0),
        lambda: torch.ones(2).new_zeros(4, device="cuda"),
        lambda: nn.Linear(2, 2, device="cuda").weight,
        lambda: nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight,
        lambda: nn.Linear(2, 2).to("cuda").weight,
        lambda: torch.randn(2, pin_memory=True),
        lambda: torch.zeros(2, device="cpu").pin_memory(),
    ],
)
def test_tensors_asked_for_on_cuda_are_on_the_cpu(make):
    tensor = make()
    assert tensor.device == CPU and not tensor.is_pinned()


def test_dtype_and_meta_requests_pass():
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8
    assert torch.zeros(3, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(3).device.type == "meta"
    with torch.device("cuda"):
        assert torch.zeros(3).device == CPU


def test_type_names_are_those_the_trainer_compares_with():
    """Megatron buckets gradients by the names of CUDA's tensor types."""
    for dtype, name in ((torch.float32, "Float"), (torch.float16, "Half"), (torch.bfloat16, "BFloat16")):
        assert torch.ones(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
        assert torch.ones(1).type(f"torch.cuda.{name}Tensor").dtype == dtype
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_gradients_flow_through_moves():
    x = torch.ones(3, requires_grad=True)
    (2 * x.cuda()).to("cuda", non_blocking=True).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_backward_passes_ask_for_cuda():
    """They found no CUDA device where layers with sequence parallelism are recomputed."""

    class OnCuda(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + torch.zeros(3, device="cuda")

    x = torch.ones(3, requires_grad=True)
    torch.autograd.backward((OnCuda.apply(x),), (torch.full((3,), 2.0),))
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_other_threads_work_alike():
    """Autograd may run a backward pass, and checkpointing a forward pass, in a thread of its own: it asked for CUDA."""
    x, result = torch.ones(3, requires_grad=True), []

    def work():
        torch.zeros(3, device="cuda")
        result.append(torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=True).sum())
        result[0].backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, torch.ones(3).exp())
