"""Gradient accumulation fusion without NVIDIA's apex: the product that makes a weight's gradient adds it to its buffer.

Megatron 0.19.2 takes `fused_weight_gradient_mlp_cuda` for that, a module that apex compiles. Without it the product is
rounded to the weight's 16 bits, written, read and added by a kernel of its own, and autograd accumulates each gradient
on the host.
"""

import importlib.util
import sys
from types import ModuleType

from megatron_ksa.kernels.weight_gradient import add_product

NAME = "fused_weight_gradient_mlp_cuda"


def install_weight_gradients() -> bool:
    """Stand in for apex's module where it is not installed.

    Returns:
        Whether this project's product is what Megatron takes from now on.
    """
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        module = ModuleType(NAME, __doc__)
        module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = add_product
        sys.modules[NAME] = module
        # Imported before this, Megatron has looked for the module already.
        if layers := sys.modules.get("megatron.core.tensor_parallel.layers"):
            layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = module, True
    return getattr(sys.modules.get(NAME), "wgrad_gemm_accum_fp32", None) is add_product
