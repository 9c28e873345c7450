"""Weight gradients of Transformer Engine's linear layers: the first product is written to the buffer, others added.

Transformer Engine 2.20.2 decides in the forward pass whether a product overwrites its buffer: in FP8 that of a module's
first call in an iteration, in 16 bits that of its first call ever. A projection that is called twice in a micro-batch
(text rows, then summary rows that share or blend it) so overwrites in its last product what its second call has added:
the summary rows' gradient was lost. All other products read a buffer that was zeroed before: 8 bytes a parameter.

Here it is decided when the product is formed: the first one in an iteration overwrites a buffer that was not zeroed
(`gradient_buffers`), every other one adds.
"""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron_ksa.kernels.weight_gradient import unwritten
from megatron_ksa.upstream.patches import Patch, signature

MODULES = ("transformer_engine.pytorch.module.linear", "transformer_engine.pytorch.module.layernorm_linear")
NEEDED = frozenset({"out", "accumulate", "grad"})


def general_gemm(original: Callable) -> Callable:
    """Transformer Engine's function of this name, called for every product of a linear layer."""

    @wraps(original)
    def run(*args: Any, **options: Any) -> Any:
        out = options.get("out")
        if out is not None and options.get("grad") and "accumulate" in options and unwritten.owns(out):
            options["accumulate"] = not unwritten.take(out)
        return original(*args, **options)

    return run


def patches() -> tuple[Patch, ...]:
    """The replacement in each module that forms such products; none of a version whose function takes other options."""
    found = [(name, getattr(sys.modules.get(name), "general_gemm", None)) for name in MODULES]
    return tuple(
        Patch(
            f"{name}:general_gemm", general_gemm, why="a second call's weight gradient is overwritten by the first's",
            expects=signature(function),
        )
        for name, function in found
        if callable(function) and NEEDED.issubset(inspect.signature(function).parameters)
    )  # fmt: skip
