"""Weight gradients of Transformer Engine's linear layers, whose package needs a GPU: a stand-in forms them here."""

import sys
import types

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from single_process import process_groups, transformer_config

from megatron_ksa.kernels import dispatch, weight_gradient
from megatron_ksa.kernels.weight_gradient import UnwrittenBuffers
from megatron_ksa.upstream import gradient_buffers, te_gradients
from megatron_ksa.upstream.patches import apply


def general_gemm(A, B, out_dtype=None, *, accumulate=False, layout="TN", out=None, grad=False):
    """Transformer Engine's product B^T A of a weight's gradient, into `out`."""
    product = B.t() @ A
    return out.add_(product) if accumulate else out.copy_(product)


class Product(torch.autograd.Function):
    """Transformer Engine's linear layer: the forward pass decides whether the product overwrites its buffer."""

    @staticmethod
    def forward(ctx, rows, weight, is_first):
        ctx.save_for_backward(rows, weight)
        ctx.is_first = is_first
        return rows @ weight.t()

    @staticmethod
    def backward(ctx, d_out):
        rows, weight = ctx.saved_tensors
        form = sys.modules[te_gradients.MODULES[0]].general_gemm
        form(rows, d_out, layout="NT", out=weight.main_grad, accumulate=not ctx.is_first, grad=True)
        weight.grad_added_to_main_grad = True
        return d_out @ weight, torch.full_like(weight, float("nan")), None


class Twice(torch.nn.Module):
    """A projection of text rows that projects summary rows too, and a gain whose gradient autograd adds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.gain = torch.nn.Parameter(torch.ones(8))
        self.fused, self.is_first_microbatch = True, True

    def forward(self, rows):
        parts = []
        for part in rows.split([4, 2]):
            first, self.is_first_microbatch = self.is_first_microbatch, False
            projected = Product.apply(part, self.weight, first) if self.fused else part @ self.weight.t()
            parts.append(projected * self.gain)
        return torch.cat(parts)


@pytest.fixture
def buffers(monkeypatch):
    """A state of this test's own and the stand-in, with the replacements for the length of one test."""
    process_groups()
    own = UnwrittenBuffers()
    for module in (weight_gradient, gradient_buffers, te_gradients):
        monkeypatch.setattr(module, "unwritten", own)
    for name in te_gradients.MODULES:
        module = types.ModuleType(name)
        module.general_gemm = general_gemm
        for place in (name, name.rpartition(".")[0], "transformer_engine.pytorch", "transformer_engine"):
            monkeypatch.setitem(sys.modules, place, module if place == name else types.ModuleType(place))
    found = te_gradients.patches()
    assert len(found) == 2
    with apply([*gradient_buffers.PATCHES, *found]):
        yield own
    dispatch.take_apart(())


def gradients(fused):
    """Of three iterations of one, two and one micro-batches, with FP8's flag for an iteration's first."""
    model = DistributedDataParallel(transformer_config(), DistributedDataParallelConfig(), Twice())
    results = []
    for batches in (1, 2, 1):
        model.zero_grad_buffer()
        model.module.fused, model.module.is_first_microbatch = fused, True
        for number in range(batches):
            rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(number))
            model(rows).square().sum().backward()
        model.finish_grad_sync()
        results.append([parameter.main_grad.clone() for parameter in model.parameters()])
    return results


@pytest.mark.parametrize("apart", [False, True])
def test_a_second_calls_gradient_is_kept(buffers, apart):
    """The first call's product, formed last, overwrote it: summary rows taught a shared projection nothing."""
    dispatch.take_apart({"gradients"} if apart else ())
    marked, mark = [], buffers.mark
    buffers.mark = lambda buffer: mark(buffer) and not marked.append(buffer.shape)
    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)
    # Not zeroed from the second iteration on, once a product was written there.
    assert marked == ([(8, 8)] * 2 if not apart else [])


def test_other_products_are_left_alone(buffers):
    """Of rows, and into memory that is not zeroed at an iteration's beginning, as sharded data parallelism has it."""
    form = sys.modules[te_gradients.MODULES[1]].general_gemm
    out, rows = torch.full((8, 8), float("nan")), torch.ones(3, 8)
    assert torch.equal(form(rows, rows, out=out, accumulate=False, grad=True), torch.full((8, 8), 3.0))
    buffers.own([out])
    assert torch.equal(form(rows, rows, out=out, accumulate=False), torch.full((8, 8), 3.0))


def test_functions_of_other_options_are_not_replaced(monkeypatch):
    for name in te_gradients.MODULES:
        module = types.ModuleType(name)
        module.general_gemm = lambda a, b, workspace: None
        monkeypatch.setitem(sys.modules, name, module)
    assert te_gradients.patches() == ()


def test_a_graph_captured_before_any_product_goes_on_adding(monkeypatch):
    """Its buffer counted as zeros from the next iteration on, and the graph added to what was there."""
    buffers, total = UnwrittenBuffers(), torch.zeros(2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not buffers.take(total) and not buffers.mark(total)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not buffers.take(total) and buffers.mark(total)
