"""Which parameters of a model belong to summary rows, how they start, and training of them alone."""

from collections.abc import Collection

import torch
from torch import nn

from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.layers import SplitLayerNorm

# Parts of a parameter's name, with a dot before it.
NAMES = (
    ".summary_embedding.", ".linear_qkv_summary.", ".q_layernorm_summary.", ".k_layernorm_summary.",
    ".input_layernorm.summary.",
)  # fmt: skip


def is_summary_parameter(name: str) -> bool:
    """Whether a parameter, by its name in a model, is of summary rows only."""
    return any(part in f".{name}" for part in NAMES)


def freeze_shared_parameters(model: nn.Module) -> None:
    """Let summary parameters train alone (`--ksa-train summary`): the others get no gradients and no optimizer state.

    To be called before Megatron wraps the model for data parallelism, which makes gradient buffers.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_summary_parameter(name))


@torch.no_grad()
def copy_shared_parameters(model: nn.Module, only: Collection[str] | None = None) -> None:
    """Set the summary projections and norms of every layer to the shared ones.

    Args:
        only: names of parameters, of which at least one is to be copied for a projection or norm to be; None for all.
    """
    for name, module in model.named_modules():
        if isinstance(module, KSASelfAttention):
            pairs = {f"{part}_summary": part for part in ("linear_qkv", "q_layernorm", "k_layernorm")}
        else:
            pairs = {"summary": "text"} if isinstance(module, SplitLayerNorm) else {}
        for target, source in pairs.items():
            prefix = f"{name}.{target}."
            if getattr(module, target) is not None and (only is None or any(one.startswith(prefix) for one in only)):
                # Parameters alone: a norm fused with the projection is the source's, and FP8's scales stay apart.
                shared = dict(getattr(module, source).named_parameters())
                for parameter, own in getattr(module, target).named_parameters():
                    own.copy_(shared[parameter])
