"""Which parameters of a model belong to summary rows, how they start, and training of them alone."""

from megatron.core.transformer.module import MegatronModule
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


def copy_shared_parameters(model: MegatronModule) -> None:
    """Set the summary projections and norms of every layer to the shared ones."""
    for module in model.modules():
        if isinstance(module, KSASelfAttention):
            _copy(module.linear_qkv, module.linear_qkv_summary)
            _copy(module.q_layernorm, module.q_layernorm_summary)
            _copy(module.k_layernorm, module.k_layernorm_summary)
        elif isinstance(module, SplitLayerNorm):
            _copy(module.text, module.summary)


def _copy(source: MegatronModule | None, target: MegatronModule | None) -> None:
    if target is not None:
        target.load_state_dict(source.state_dict())
