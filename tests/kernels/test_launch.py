"""Repeated launches get the addresses of their own call, and nothing else of the first one."""

from typing import NamedTuple

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ksa.kernels import launch as launches


class Compiled:
    """Stands for what Triton compiles: notes its grid and arguments."""

    packed_metadata = None

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """Stands for a Triton kernel p_x, d_y, p_none, size, BLOCK; counts launches that go through Triton."""

    arg_names = ["p_x", "d_y", "p_none", "size", "BLOCK"]

    def __init__(self):
        self.compiled, self.launched = Compiled(), 0

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.launched += 1
            return self.compiled

        return run


def op(kernel):
    @launches.repeatable
    def run(tensors, settings):
        x, y, total = tensors
        descriptor = TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 8])
        launches.launch(kernel, (3, 2), x, descriptor, None, x.shape[0], BLOCK=settings[0], num_warps=4)
        launches.call(torch.Tensor.add_, total, 1)

    return run


def inputs():
    return torch.zeros(5), torch.zeros(4, 8), torch.zeros(1)


def test_a_second_call_fills_in_its_addresses():
    kernel = Kernel()
    run = op(kernel)
    run(inputs(), (16,))
    x, y, total = inputs()
    run((x, y, total), (16,))
    assert kernel.launched == 1 and len(kernel.compiled.calls) == 1
    grid, (p_x, d_y, *rest) = kernel.compiled.calls[0]
    assert grid == (3, 2, 1) and p_x == x.data_ptr() and rest == [None, 5, 16]
    assert isinstance(d_y, TensorDescriptor) and d_y.base.data_ptr() == y.data_ptr()
    assert (d_y.shape, d_y.strides, d_y.block_shape, d_y.padding) == ([4, 8], [8, 1], [1, 8], "zero")
    assert total.item() == 1


@pytest.mark.parametrize("other", ["shape", "stride", "dtype", "alignment", "settings", "absent"])
def test_another_kind_of_call_goes_through_triton(other):
    kernel = Kernel()
    run = op(kernel)
    run(inputs(), (16,))
    x, y, total = inputs()
    settings = (32,) if other == "settings" else (16,)
    if other == "absent":
        absent = launches.repeatable(lambda tensors, settings: launches.launch(kernel, (1,), *tensors, 1, 2, BLOCK=1))
        absent((x, None), ())
        absent((x, total), ())
        assert kernel.launched == 3
        return
    x = {"shape": torch.zeros(6), "stride": torch.zeros(10)[::2], "dtype": x.half()}.get(other, x)
    x = torch.zeros(6)[1:] if other == "alignment" else x
    run((x, y, total), settings)
    assert kernel.launched == 2 and not kernel.compiled.calls


def test_one_tensor_in_two_places_may_be_two_tensors_later():
    """Attention with the keys as values, then with values of their own, read the keys twice."""
    kernel = Kernel()
    run = launches.repeatable(lambda tensors, settings: launches.launch(kernel, (1,), *tensors, 1, 2, BLOCK=1))
    one, two = torch.zeros(4), torch.zeros(4)
    run((one, one), ())
    run((one, two), ())
    assert kernel.compiled.calls[0][1][:2] == (one.data_ptr(), two.data_ptr())


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def test_groups_of_tensors_keep_their_names():
    """Tensors were found by their place in one tuple: a new one in the middle moved all that came after."""
    kernel, seen = Kernel(), []

    @launches.repeatable
    def run(pair, rest, settings):
        seen.append((type(pair), pair.second, len(rest)))
        launches.launch(kernel, (1,), pair.first, *rest, 1, 2, BLOCK=settings[0])

    run(Pair(torch.zeros(4), None), (torch.zeros(5),), (1,))
    first, last = torch.zeros(4), torch.zeros(5)
    run(Pair(first, None), (last,), (1,))
    assert seen == [(Pair, None, 1)]
    assert kernel.compiled.calls[0][1][:2] == (first.data_ptr(), last.data_ptr())


def test_a_tensor_from_elsewhere_is_refused():
    kernel, hidden = Kernel(), torch.zeros(7)
    run = launches.repeatable(lambda tensors, settings: launches.launch(kernel, (1,), hidden, *tensors, 1, 2, BLOCK=1))
    with pytest.raises(LookupError, match=r"\(7,\)"):
        run((torch.zeros(4),), ())


def test_kinds_that_never_repeat_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(launches, "KINDS", 3)
    kernel = Kernel()
    run = op(kernel)
    for size in range(1, 9):
        run((torch.zeros(size), *inputs()[1:]), (16,))
    assert kernel.launched == 8
    run((torch.zeros(8), *inputs()[1:]), (16,))
    assert kernel.launched == 8
