"""Triton's interpreter works out the same things at every operation: once is enough for tests, in half the time.

Its operators also compute whether an integer overflows and, outside of debug mode, look at no result: here they look.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType

import numpy as np

MODULE = "triton.runtime.interpreter"
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def interpret_once() -> None:
    """Patch Triton's interpreter, where it is imported and not patched yet."""
    interpreter = sys.modules.get(MODULE)
    if interpreter is None or getattr(interpreter, "interprets_once", False):
        return
    interpreter.interprets_once = True
    interpreter._patch_lang = _language(interpreter)
    interpreter._get_np_dtype = _numpy_type(interpreter)
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
    _keep_shapes(interpreter.tl.core)


def _language(interpreter: ModuleType) -> Callable:
    """Skip what a launch that still runs has replaced of the language.

    A launch replaces the language's functions and restores them at its end; each of its thousands of device functions
    looked through the whole language again.
    """
    original, language = interpreter._patch_lang, interpreter.tl
    # By identity: modules whose functions are replaced now.
    replaced: set[int] = set()

    @functools.wraps(original)
    def patch(fn: FunctionType) -> object:
        seen = {id(value) for value in fn.__globals__.values() if value is language or value is language.core}
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()
        scope, new = original(fn), seen - replaced
        replaced.update(new)
        restore = scope.restore

        def restored() -> None:
            restore()
            replaced.difference_update(new)

        scope.restore = restored
        return scope

    return patch


def _numpy_type(interpreter: ModuleType) -> Callable:
    """Look a type's numpy type up in a table that is not built for each of them."""
    look_up = functools.cache(interpreter._get_np_dtype)
    pointer, address = interpreter.tl.pointer_type, np.dtype(np.uint64)

    def numpy_type(dtype: object) -> np.dtype:
        # Of a block's elements; pointers cannot be hashed.
        scalar = dtype.scalar
        return address if isinstance(scalar, pointer) else look_up(scalar)

    return numpy_type


def _check_overflow(left: object, right: object, operation: Callable) -> None:
    """Compute an operation on integers of fewer than 64 bits in 64 bits, and see whether the result fits.

    Raises:
        OverflowError: it does not.
    """
    dtype = left.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    name = operation.__name__
    result = OPERATIONS[name](left.handle.data, right.handle.data, dtype=np.int64)
    if result.min() < dtype.get_int_min_value() or result.max() > dtype.get_int_max_value():
        raise OverflowError(f"{dtype} overflows in {name}: {result.min()} to {result.max()}")


def _keep_shapes(core: ModuleType) -> None:
    """Tensors and blocks of one shape share what is derived from it."""

    @functools.cache
    def tensor_shape(shape: tuple[int, ...]) -> tuple:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def make_tensor(tensor: object, handle: object, type: object) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.numel, tensor.shape = tensor_shape(type.shape if type.is_block() else ())

    make_block, blocks = core.block_type.__init__, {}

    def make_block_once(block: object, element_ty: object, shape: Iterable) -> None:
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = element_ty.name, sizes
        if key not in blocks:
            make_block(block, element_ty, shape)
            blocks[key] = block.shape, block.numel, block.name
        block.element_ty, (block.shape, block.numel, block.name) = element_ty, blocks[key]

    compare = core.dtype.__eq__
    core.tensor.__init__, core.block_type.__init__ = make_tensor, make_block_once
    core.dtype.__eq__ = lambda one, other: one is other or compare(one, other)
