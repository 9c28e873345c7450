"""Gradient buffers that the first product overwrites: the same gradients, and zeros where no product came."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from single_process import process_groups, transformer_config

from megatron_ksa.kernels import dispatch, weight_gradient
from megatron_ksa.kernels.weight_gradient import UnwrittenBuffers, add_product
from megatron_ksa.upstream import gradient_buffers
from megatron_ksa.upstream.patches import apply


class Product(torch.autograd.Function):
    """A linear layer with Megatron's protocol of gradient accumulation fusion."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return rows @ weight.t()

    @staticmethod
    def backward(ctx, d_out):
        rows, weight = ctx.saved_tensors
        add_product(rows, d_out, weight.main_grad)
        weight.grad_added_to_main_grad = True
        return d_out @ weight, torch.full_like(weight, float("nan"))


class Experts(torch.nn.Module):
    """Two linear layers, of which a pass uses some, and a gain whose gradient autograd adds."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (torch.nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(2))
        self.gain = torch.nn.Parameter(torch.ones(8))
        self.fused = True

    def forward(self, rows, used):
        for name in used:
            weight = getattr(self, name)
            rows = rows + (Product.apply(rows, weight) if self.fused else rows @ weight.t()) * self.gain
        return rows


@pytest.fixture
def buffers(monkeypatch):
    """A state of this test's own, with the replacements for the length of one test."""
    process_groups()
    own = UnwrittenBuffers()
    monkeypatch.setattr(weight_gradient, "unwritten", own)
    monkeypatch.setattr(gradient_buffers, "unwritten", own)
    # The trainer of another test may have put them in place in this process: they are the same functions twice.
    with apply(gradient_buffers.PATCHES):
        yield own
    dispatch.take_apart(())


def gradients(apart, fused=True, distributed=False):
    """Of each iteration, after Megatron's reduction, whatever was in the buffers before."""
    dispatch.take_apart({"gradients"} if apart else ())
    config = transformer_config()
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), Experts()
    )
    results = []
    # The second iteration has two micro-batches; the third leaves one expert out, the fourth goes on without the
    # fused product.
    for passes in ([("first", "second")], [("first", "second"), ("second",)], [("first",)], [("second", "first")]):
        model.zero_grad_buffer()
        model.module.fused = fused and len(results) < 3
        for number, used in enumerate(passes):
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(5, 8, generator=generator), used).square().sum().backward()
        model.finish_grad_sync()
        results.append([parameter.main_grad.clone() for parameter in model.parameters()])
    return results


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_those_of_zeroed_buffers(buffers, distributed):
    zeroed = []
    add, buffers_zero = buffers.mark, zeroed.append
    buffers.mark = lambda buffer: add(buffer) or buffers_zero(buffer.shape)
    expected = gradients(apart=True, fused=False, distributed=distributed)
    apart, together = (gradients(apart, distributed=distributed) for apart in (True, False))
    for one, other, plain in zip(apart, together, expected, strict=True):
        for a, b, c in zip(one, other, plain, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)
    # Once for each weight, before a product has gone there, and every time for the gain.
    assert zeroed.count((8,)) == 4 and zeroed.count((8, 8)) == 2
    assert not together[2][1].any(), "the expert without rows"
