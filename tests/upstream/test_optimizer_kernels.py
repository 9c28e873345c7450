"""torch's multi-tensor kernels in place of Megatron's loops: the same numbers."""

import copy

import pytest
import torch
from megatron.core import utils

from megatron_ksa.upstream import optimizer_kernels

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def tensors(device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device) * 3 for shape in ((17, 5), (1,), (300, 40))]


@pytest.mark.parametrize("device", DEVICES)
def test_norm_is_megatrons(device):
    parts = tensors(device)
    norm, _ = optimizer_kernels.l2_norm(65536, None, [parts], False)
    # Megatron's is on the GPU, where there is one, whatever its tensors are on.
    expected = utils.local_multi_tensor_l2_norm(65536, None, [parts], False)[0].to(device)
    assert norm.shape == expected.shape and norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_is_megatrons(dtype, factor):
    source = tensors("cpu")
    actual, expected = ([torch.zeros_like(part, dtype=dtype) for part in source] for _ in range(2))
    optimizer_kernels.scale(65536, None, [source, actual], factor)
    utils.local_multi_tensor_scale(65536, None, [source, expected], factor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_scale_in_place():
    """Clipping hands the same tensors twice."""
    parts = tensors("cpu")
    expected = [part * 0.5 for part in parts]
    optimizer_kernels.scale(65536, None, [parts, list(parts)], 0.5)
    torch.testing.assert_close(parts, expected, rtol=0, atol=0)


def steps(adam: torch.optim.Optimizer, parameters: list[torch.Tensor], count: int) -> None:
    for step in range(count):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) * (step + 1))
        adam.step()


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_of_another_machine_keeps_the_kernel_of_this_one(device):
    """The saved groups say what that machine took; its steps are where it kept them."""
    parameters = [torch.nn.Parameter(part) for part in tensors(device)]
    adam = torch.optim.AdamW(parameters, lr=1e-2)
    optimizer_kernels.fuse(adam)
    on_gpu = device == "cuda"
    assert bool(adam.param_groups[0]["fused"]) == on_gpu
    steps(adam, parameters, 2)
    saved = copy.deepcopy(adam.state_dict())
    continued = copy.deepcopy(parameters)
    for group in saved["param_groups"]:
        group["fused"] = None if on_gpu else True
    other = torch.optim.AdamW(continued, lr=1e-2)
    optimizer_kernels.fuse(other)
    other.load_state_dict(saved)
    assert bool(other.param_groups[0]["fused"]) == on_gpu
    assert {state["step"].device.type for state in other.state.values()} == {device}
    steps(adam, parameters, 2)
    steps(other, continued, 2)
    torch.testing.assert_close([*continued], [*parameters], rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_steps_are_those_of_the_loop():
    parameters = [[torch.nn.Parameter(part.clone()) for part in tensors("cuda")] for _ in range(2)]
    fused, plain = (torch.optim.AdamW(group, lr=1e-2) for group in parameters)
    optimizer_kernels.fuse(fused)
    steps(fused, parameters[0], 3)
    steps(plain, parameters[1], 3)
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-6, atol=1e-7)
