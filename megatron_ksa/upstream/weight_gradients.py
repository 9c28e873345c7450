"""Gradient accumulation fusion without NVIDIA's apex: the product that makes a weight's gradient adds it to its buffer.

Megatron 0.19.2 takes `fused_weight_gradient_mlp_cuda` for that, a module that apex compiles. Without it the product is
rounded to the weight's 16 bits, written, read and added by a kernel of its own, and autograd accumulates each gradient
on the host.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from megatron_ksa.kernels.weight_gradient import add_product
from megatron_ksa.upstream.patches import ABSENT, Patch

NAME = "fused_weight_gradient_mlp_cuda"
LAYERS = "megatron.core.tensor_parallel.layers"
WHY = "apex's kernel, which adds a weight's gradient to its buffer, is not installed"


class _Module(ModuleType):
    """What Megatron calls of apex's module."""

    wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = staticmethod(add_product)


MODULE = _Module(NAME, __doc__)
# Whoever looks for apex's module with `find_spec` gets a ValueError of one without.
MODULE.__spec__ = ModuleSpec(NAME, None)
PATCHES = (
    # Megatron imports it in several places, some of them when a gradient is formed.
    Patch(f"sys:modules.{NAME}", lambda original: MODULE, why=WHY, expects=ABSENT),
    Patch(f"{LAYERS}:{NAME}", lambda original: MODULE, why=WHY, expects=ABSENT),
    Patch(f"{LAYERS}:_grad_accum_fusion_available", lambda original: True, why=WHY, expects="bool"),
)


def patches() -> tuple[Patch, ...]:
    """The stand-ins for apex's module; none where it is installed."""
    return () if NAME in sys.modules or importlib.util.find_spec(NAME) is not None else PATCHES
