"""Layer specs of a KSA or HARPE model, made from Megatron's own specs by replacing the attention."""

import dataclasses
from functools import partial

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import LinearQkvBuilder
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MlpBuilder, get_transformer_layer_offset

from megatron_ksa.config.ksa import KSAConfig, KSALayer, LayerKind
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.attention import KSASelfAttention, KSASelfAttentionSubmodules
from megatron_ksa.model.core_attention import KSACoreAttention, TextCoreAttention
from megatron_ksa.model.layers import BypassTransformerLayer, SplitLayerNorm, residual_sum
from megatron_ksa.model.norm import Norm, ResidualNorm, fits_kernel
from megatron_ksa.model.norm_of_linear import DecoderLayer, NormOfLinear, holding_norm
from megatron_ksa.model.rotated_attention import RotatedSelfAttention


def uses_transformer_engine(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def _backend(config: TransformerConfig) -> BackendSpecProvider:
    if not uses_transformer_engine(config):
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


@dataclasses.dataclass(frozen=True)
class _Projection:
    """Modules of a column-parallel projection.

    Attributes:
        norm: stands before the projection; nothing where the projection normalises.
        linear: the projection, of all rows or of text rows.
        summary: the projection of summary rows alone.
    """

    norm: LayerNormBuilder
    linear: LinearQkvBuilder
    summary: LinearQkvBuilder


def _runs_norm_apart(config: TransformerConfig) -> bool:
    """Whether this project's norm stands before Transformer Engine's products, in place of the norm in their modules.

    In 16 bits such a module runs a norm and then a product; this project's norm adds the residual connection's
    gradient in its backward kernel. In FP8 the module's norm writes the 8-bit numbers that the product reads; which
    layers are in FP8 may be decided in each pass. Communication that overlaps and fused MLPs need the module too.
    """
    in_eight_bits = config.fp8 or config.fp4 or config.quant_recipe is not None
    needs_module = config.tp_comm_overlap or config.use_transformer_engine_op_fuser
    return fits_kernel(config, config.hidden_size) and not in_eight_bits and not needs_module


def _projection(config: TransformerConfig) -> _Projection:
    """What projects rows, with the norm in the module that has its parameter in checkpoints' order."""
    backend = _backend(config)
    plain = backend.column_parallel_linear()
    if not backend.fuse_layernorm_and_linear():
        return _Projection(ResidualNorm, plain, plain)
    if _runs_norm_apart(config):
        return _Projection(NormOfLinear, holding_norm(plain), plain)
    fused = backend.column_parallel_layer_norm_linear()
    return _Projection(IdentityOp, fused, fused)


def _dense_mlp(mlp: MlpBuilder, linear_fc1: type) -> MlpBuilder | None:
    """Megatron's dense MLP with another first projection; None of experts."""
    parts = mlp.keywords.get("submodules") if isinstance(mlp, partial) else None
    if not isinstance(parts, MLPSubmodules):
        return None
    parts = dataclasses.replace(parts, linear_fc1=linear_fc1)
    return partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": parts})


def _layer_spec(
    base: ModuleSpec, config: TransformerConfig, ksa: KSAConfig, layer: KSALayer, layout: RowLayout
) -> ModuleSpec:
    """Megatron's layer `base` with the attention of `layer`.

    The norms of heads are this project's in every kind of layer, because the rotation's kernel computes them.
    """
    # Summary rows with a norm of their own may be projected by the text's projection: no fused module has two norms.
    splits_norm = layer.has_summaries and ksa.independent_layernorm
    projection = _projection(config)
    plain = _backend(config).column_parallel_linear()
    linear_qkv, linear_qkv_summary = (plain, plain) if splits_norm else (projection.linear, projection.summary)
    heads = {"q_layernorm": Norm, "k_layernorm": Norm} if config.qk_layernorm else {}
    # Checkpoints have one name for the input norm whatever the layers are made of: that of the fused module.
    names = base.submodules.sharded_state_dict_keys_map | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    submodules = dataclasses.replace(
        base.submodules, input_layernorm=projection.norm, sharded_state_dict_keys_map=names,
        self_attn_bda=residual_sum, mlp_bda=residual_sum,
    )  # fmt: skip
    if projection.norm is NormOfLinear:
        # Experts keep Megatron's norm before their router.
        if (mlp := _dense_mlp(submodules.mlp, projection.linear)) is not None:
            submodules.mlp, submodules.pre_mlp_layernorm = mlp, NormOfLinear
    elif not uses_transformer_engine(config):
        submodules.pre_mlp_layernorm = ResidualNorm
    elif config.use_transformer_engine_op_fuser:
        submodules.mlp = get_mlp_module_spec_for_backend(_backend(config), use_te_op_fuser=True)
    attention = dict(linear_qkv=linear_qkv, linear_proj=_backend(config).row_parallel_linear(), **heads)
    if not layer.has_summaries:
        module, params, core = RotatedSelfAttention, {}, TextCoreAttention
        if layer.kind == LayerKind.WINDOW:
            core = partial(TextCoreAttention, chunk_size=ksa.chunk_size, window_chunks=layer.window_chunks)
        attention = type(base.submodules.self_attention.submodules)(core_attention=core, **attention)
    else:
        core = partial(
            KSACoreAttention, layout=layout, window_chunks=layer.window_chunks,
            sees_all_text=layer.kind == LayerKind.LARGE_WINDOW,
        )  # fmt: skip
        module, params = KSASelfAttention, {"layout": layout}
        if ksa.independent_projections:
            attention["linear_qkv_summary"] = linear_qkv_summary
        if ksa.independent_qk_norm and config.qk_layernorm:
            attention |= {"q_layernorm_summary": Norm, "k_layernorm_summary": Norm}
        attention = KSASelfAttentionSubmodules(core_attention=core, **attention)
        if splits_norm:
            submodules.input_layernorm = partial(SplitLayerNorm, norm=Norm, layout=layout)
    submodules.self_attention = ModuleSpec(
        module=module, params={"attn_mask_type": AttnMaskType.causal, **params}, submodules=attention
    )
    if ksa.has_summaries and not layer.has_summaries:
        return ModuleSpec(module=BypassTransformerLayer, params={"layout": layout}, submodules=submodules)
    return ModuleSpec(module=DecoderLayer, submodules=submodules)


def ksa_block_spec(
    config: TransformerConfig, ksa: KSAConfig, seq_length: int, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage builds; with KSA off, all of them are full layers.

    Args:
        config: Megatron's transformer configuration.
        seq_length: n, text tokens in a sequence, which decides the window of large-window layers.
        vp_stage: virtual pipeline stage.

    Raises:
        UsageError: a pattern in `ksa` that does not fit the number of layers.
    """
    layout = ksa.rows
    plan = dataclasses.replace(ksa, **({} if ksa.enabled else {"layer_pattern": "f", "chunk_size": 1}))
    base = get_gpt_decoder_layer_specs(
        config, uses_transformer_engine(config), config.normalization, config.qk_l2_norm, vp_stage=vp_stage
    )
    layers = [
        _layer_spec(spec, config, ksa, layer, layout)
        for spec, layer in zip(base, plan.layers(config.num_layers, seq_length), strict=True)
    ]
    if config.pipeline_model_parallel_layout is not None:
        ids = config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
        layers = [layers[i] for i in ids]
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)
