"""Small models in one process, for tests that need no trainer."""

import functools

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.model.builder import KSAGPTModelBuilder, KSAGPTModelConfig
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.platform.ports import free_port

VOCABULARY = 64


@functools.cache
def process_groups() -> ProcessGroupCollection:
    """Megatron's process groups for a world of one."""
    if not torch.distributed.is_initialized():
        address = f"tcp://127.0.0.1:{free_port()}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return ProcessGroupCollection.use_mpu_process_groups()


def transformer_config(**changes) -> TransformerConfig:
    """Qwen3-like settings of a tiny model: RMS norm, SwiGLU, Q/K norm, 4 query heads in 2 groups."""
    settings = dict(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        layernorm_epsilon=1e-6,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        transformer_impl="local",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return TransformerConfig(**{**settings, **changes})


def build_model(ksa: KSAConfig, config: TransformerConfig | None = None, *, seed: int = 0, **changes) -> KSAGPTModel:
    """A model with random weights; `changes` are fields of `KSAGPTModelConfig`."""
    groups = process_groups()
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        seq_length=256,
        text_length=64,
        position_embedding_type="rope",
        ksa=ksa,
        transformer=config or transformer_config(),
    )
    return KSAGPTModelBuilder(KSAGPTModelConfig(**{**settings, **changes})).build_model(groups)


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length] token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)
