"""A step of Adam over many parameters: torch's own, in plain PyTorch and in the Triton kernel."""

import pytest
import torch
import triton
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.adam import AdamTensors, reference, triton_adam, triton_norm

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
IMPLEMENTATIONS = [
    pytest.param(reference.adam_step, id="reference"),
    pytest.param(triton_adam.adam_step, id="triton", marks=needs_kernels),
]
# One element, less than a block, one chunk to the element, several chunks and a ragged tail.
SIZES = [(1,), (33, 5), (8192,), (3 * 8192 + 17,)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def start(offset=0):
    """Parameters and three steps' gradients, inside larger buffers from an element on."""
    generator = torch.Generator().manual_seed(0)

    def tensor(size):
        count = torch.Size(size).numel()
        buffer = torch.randn(count + offset, generator=generator).to(DEVICE)
        return buffer[offset:].view(size)

    return [tensor(size) for size in SIZES], [[tensor(size) for size in SIZES] for _ in range(3)]


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("offset", [0, 1])
def test_three_steps_are_torchs(step, decoupled, scale, offset):
    """Also at addresses that are no multiples of 16 bytes."""
    parameters, gradients = start(offset)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = [torch.nn.Parameter(parameter.double()) for parameter in parameters]
    adam = kind(expected, **OPTIONS)
    copies = [torch.empty_like(parameter, dtype=torch.bfloat16) for parameter in parameters]
    copies[1] = None
    means, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    steps = [torch.zeros((), device=DEVICE) for _ in parameters]
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    for number, now in enumerate(gradients):
        for parameter, gradient in zip(expected, now, strict=True):
            parameter.grad = gradient.double() * (1.0 if scale is None else scale)
        adam.step()
        torch._foreach_add_(steps, 1)
        before = [gradient.clone() for gradient in now]
        tensors = AdamTensors(parameters, now, means, squares, copies, steps)
        step(parameters, tensors, factor, decoupled=decoupled, **OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        for parameter, mean, square, wanted in zip(parameters, means, squares, expected, strict=True):
            for actual, exact in (
                (parameter, wanted),
                *zip((mean, square), list(adam.state[wanted].values())[1:], strict=True),
            ):
                torch.testing.assert_close(actual.double(), exact.detach(), rtol=2e-6, atol=2e-6, msg=f"step {number}")
        for parameter, copy in zip(parameters, copies, strict=True):
            # The interpreter cuts bfloat16 off instead of rounding it.
            if copy is not None and not (INTERPRETED and step is triton_adam.adam_step):
                assert torch.equal(copy, parameter.bfloat16())
            elif copy is not None:
                torch.testing.assert_close(copy.float(), parameter, rtol=2**-7, atol=0)


def test_the_reference_is_torchs_loop_to_the_bit():
    parameters, gradients = start()
    expected = [torch.nn.Parameter(parameter.clone()) for parameter in parameters]
    adam = torch.optim.AdamW(expected, foreach=False, **OPTIONS)
    means, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    steps = [torch.zeros(()) for _ in parameters]
    for now in gradients:
        for parameter, gradient in zip(expected, now, strict=True):
            parameter.grad = gradient.clone()
        adam.step()
        torch._foreach_add_(steps, 1)
        tensors = AdamTensors(parameters, now, means, squares, [None] * len(SIZES), steps)
        reference.adam_step(parameters, tensors, None, decoupled=True, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


@needs_kernels
def test_what_the_kernel_does_not_take_is_named():
    parameters = [torch.zeros(4, 4, device=DEVICE).t()[:2]]
    tensors = AdamTensors(parameters, parameters, parameters, parameters, [None], [torch.ones((), device=DEVICE)])
    with pytest.raises(UsageError, match="contiguous"):
        triton_adam.adam_step(parameters, tensors, None, decoupled=True, **OPTIONS)


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(reference.l2_norm, id="reference"),
        pytest.param(triton_norm.l2_norm, id="triton", marks=needs_kernels),
    ],
)
@pytest.mark.parametrize("offset", [0, 1])
def test_norm_of_many_tensors(norm, offset):
    tensors = [*start(offset)[0], torch.zeros(0, device=DEVICE)]
    expected = torch.cat([tensor.flatten().double() for tensor in tensors]).norm()
    got = norm(tensors)
    assert got.shape == (1,) and got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-6, atol=0)
