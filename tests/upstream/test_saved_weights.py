"""Megatron's linear layers tell DDP of the gradients that they add, whatever gives their saved tensors back."""

import contextlib

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from single_process import process_groups
from torch.autograd.graph import saved_tensors_hooks

from megatron_ksa.upstream import saved_weights, weight_gradients
from megatron_ksa.upstream.patches import apply

HOOKS = {"hooks": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
         "none": contextlib.nullcontext}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("shared", [False, True])
def test_the_weight_is_marked_and_has_a_gradient(kind, shared):
    """Under hooks autograd got none, which ended runs of `--recompute-to-fit` with `--overlap-grad-reduce`."""
    process_groups()
    torch.manual_seed(0)
    rows, weight = torch.randn(6, 1, 8, requires_grad=True), torch.nn.Parameter(torch.randn(4, 8))
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(4, 8), False, shared
    d_out = torch.randn(6, 1, 4)
    group = parallel_state.get_tensor_model_parallel_group()
    # The trainer of another test may have put them in place in this process: they are the same functions twice.
    with apply([*weight_gradients.patches(), *saved_weights.PATCHES]):
        with HOOKS[kind]():
            out = layers.LinearWithGradAccumulationAndAsyncCommunication.apply(
                rows, weight, None, True, False, False, None, None, group, 1
            )
        out.backward(d_out)
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, d_out[:, 0].t() @ rows[:, 0].detach())
    torch.testing.assert_close(rows.grad, d_out @ weight.detach())
    assert weight.grad.shape == weight.shape and (not shared or not weight.grad.any())


def test_a_frozen_weight_has_no_gradient():
    process_groups()
    rows, weight = torch.randn(6, 1, 8, requires_grad=True), torch.nn.Parameter(torch.randn(4, 8), requires_grad=False)
    group = parallel_state.get_tensor_model_parallel_group()
    with apply(saved_weights.PATCHES):
        out = layers.LinearWithGradAccumulationAndAsyncCommunication.apply(
            rows, weight, None, False, False, False, None, None, group, 1
        )
        out.sum().backward()
    assert weight.grad is None and rows.grad is not None
