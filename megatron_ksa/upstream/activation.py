"""SwiGLU of dense layers by this project's kernels, in place of those that torch.compile makes of Megatron's."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from megatron_ksa.kernels.dispatch import fuses, uses_triton
from megatron_ksa.kernels.swiglu import OP, swiglu
from megatron_ksa.upstream.patches import Patch


def _swiglu(original: Callable) -> Callable:
    """`bias_swiglu_impl` in this project's kernel; Megatron's where there is a bias, or the input is kept otherwise.

    Otherwise means in FP8 or in host memory.
    """

    @wraps(original)
    def bias_swiglu_impl(
        input: Tensor, bias: Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
    ) -> Tensor:
        plain = bias is None and not fp8_input_store and not cpu_offload_input and not torch.compiler.is_compiling()
        if plain and input.dtype != torch.float64 and fuses("activation") and uses_triton(OP, input):
            return swiglu(input)
        return original(input, bias, fp8_input_store, cpu_offload_input)

    return bias_swiglu_impl


PATCHES = (
    Patch(
        "megatron.core.transformer.mlp:bias_swiglu_impl",
        _swiglu,
        why="kernels of torch.compile cost the host several launches a call, and the backward one reads rows twice",
        expects="(input, bias, fp8_input_store=False, cpu_offload_input=False)",
    ),
)
