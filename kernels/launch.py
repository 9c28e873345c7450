"""Launches of an op's kernels, recorded on the first call of a kind and repeated with other addresses afterwards.

Before every launch Triton looks at each argument to find the compiled kernel, and checks and builds each tensor
descriptor. At 8k tokens this takes the host longer than the kernels take the GPU. The outcome depends on shapes,
strides, dtypes and settings alone, which training repeats from step to step: a repeated call fills in addresses only.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

# Kinds of calls remembered for each op. Lengths that never repeat (generation) must not pile up.
KINDS = 256
_state = threading.local()


class _Address:
    """What a tensor descriptor needs of its tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Step:
    """A launch, or another call, whose arguments are constants and addresses (or tensors) of an op's call."""

    def __init__(self, run: Callable, arguments: list, tensors: tuple, takes_addresses: bool) -> None:
        self.run, self.takes_addresses = run, takes_addresses
        places = {id(tensor): place for place, tensor in enumerate(tensors) if tensor is not None}
        self.tensors: list[tuple[int, int]] = []
        self.descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                self.tensors.append((position, _place(places, argument)))
                arguments[position] = None
            elif hasattr(argument, "block_shape"):  # a tensor descriptor, Triton's or Gluon's
                fields = vars(argument) | {"base": None}
                self.descriptors.append((position, _place(places, argument.base), type(argument), fields))
                arguments[position] = None
        self.arguments = arguments

    def __call__(self, tensors: tuple, addresses: list[int]) -> None:
        arguments = self.arguments.copy()
        values = addresses if self.takes_addresses else tensors
        for position, place in self.tensors:
            arguments[position] = values[place]
        for position, place, kind, fields in self.descriptors:
            # The checks of its constructor passed for these shapes and strides and this alignment.
            descriptor = object.__new__(kind)
            vars(descriptor).update(fields, base=_Address(addresses[place]))
            arguments[position] = descriptor
        self.run(*arguments)


def _place(places: dict[int, int], tensor: Tensor) -> int:
    try:
        return places[id(tensor)]
    except KeyError:
        shape = tuple(tensor.shape)
        raise LookupError(f"a launch uses a tensor {shape} that is not among those of its op's call") from None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, kept for repetition inside a call of a `repeatable` function."""
    compiled = kernel[grid](*arguments, **constants)
    record = getattr(_state, "record", None)
    if record is None:
        return
    rest = [constants.get(name) for name in kernel.arg_names[len(arguments) :]]
    # Triton's interpreter compiles nothing, so that nothing is repeated; the step is recorded all the same, because
    # recording refuses tensors of no group.
    run = None if compiled is None or not hasattr(compiled, "packed_metadata") else compiled[(*grid, 1, 1)[:3]]
    record(run, [*arguments, *rest], True)


def call(function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)`, kept for repetition inside a call of a `repeatable` function."""
    function(*arguments)
    if record := getattr(_state, "record", None):
        record(function, list(arguments), False)


def repeatable(launches: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a function `(*groups, settings)` that does nothing but `launch` and `call`.

    A group is a tuple of tensors or None; NamedTuples reach the function as such. Every tensor that `launch` and `call`
    use must be one of a group, the same object; the first tensor of the first group is never None. What they do may
    depend on the settings and on the tensors' shapes, strides, dtypes and alignment, and on nothing else.

    Raises:
        LookupError: a launch uses another tensor.
    """
    recorded: dict[tuple, list[_Step]] = {}

    @functools.wraps(launches)
    def run(*arguments: tuple) -> None:
        *groups, settings = arguments
        tensors = tuple(itertools.chain.from_iterable(groups))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        kind = (
            settings, tensors[0].get_device(), tuple([address % 16 for address in addresses]),
            *[None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors],
        )  # fmt: skip
        if steps := recorded.get(kind):
            for step in steps:
                step(tensors, addresses)
            return
        steps = []
        # The same tensor may stand in two places of this call, and different ones in the next: `detach` makes an object
        # for each place, and a step finds its tensors by place.
        tensors = tuple([None if tensor is None else tensor.detach() for tensor in tensors])

        def record(repeat: Callable | None, arguments: list, takes_addresses: bool) -> None:
            steps.append(_Step(repeat, arguments, tensors, takes_addresses))

        _state.record = record
        try:
            launches(*_regrouped(tensors, groups), settings)
        finally:
            _state.record = None
        if all(step.run is not None for step in steps):
            if len(recorded) >= KINDS:
                recorded.clear()
            recorded[kind] = steps

    return run


def _regrouped(tensors: tuple, groups: list[tuple]) -> list[tuple]:
    """`tensors` in groups of the sizes and types of `groups`."""
    rest = iter(tensors)
    return [getattr(group, "_make", tuple)(itertools.islice(rest, len(group))) for group in groups]
