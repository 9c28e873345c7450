"""A recomputed module that returns a parameter beside its rows, as Megatron's MLP with biases does."""

import torch
from megatron.core import tensor_parallel
from torch import nn

from megatron_ksa.upstream.recomputed_biases import without_parameters


def test_the_backward_pass_ends_with_the_plain_gradients():
    """`--recompute-modules mlp`, and `--recompute-to-fit` where it took the MLP, stood still in any model with biases.

    The bias had become the output of its own recompute, whose backward pass called itself without an end.
    """
    torch.manual_seed(0)
    rows, linear = torch.randn(6, 8, requires_grad=True), nn.Linear(8, 8)
    calls = []

    def mlp(hidden: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter]:
        calls.append(hidden)
        assert len(calls) <= 2, "recomputed more than once"
        return hidden @ linear.weight.t(), linear.bias

    def gradients(result: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        out, bias = result
        (out + bias).square().sum().backward()
        found = [tensor.grad for tensor in (rows, linear.weight, linear.bias)]
        rows.grad = linear.weight.grad = linear.bias.grad = None
        return found

    expected = gradients(mlp(rows))
    calls.clear()
    actual = gradients(tensor_parallel.checkpoint(mlp, False, rows))
    assert len(calls) == 2 and linear.bias.is_leaf
    assert all(map(torch.equal, actual, expected))


def test_parameters_stay_where_gradients_are_recorded():
    bias = nn.Parameter(torch.zeros(2))
    function = without_parameters(lambda: (None, bias))
    assert function()[1] is bias
    with torch.no_grad():
        assert function()[0] is None and not isinstance(function()[1], nn.Parameter)
        assert function()[1].data_ptr() == bias.data_ptr()
