"""What KSA and HARPE refuse or set in a configuration: one list for the trainer's flags and for library users."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.model.low_precision import check_rows_in_fp8, fp8_recipe, refused_in_fp8

POSITION_TYPES = ("rope", "harpe", "none")
CP_COMM_TYPES = ("p2p", "a2a")
# Values of `cuda_graph_impl` with which a model trains to the same numbers as without (tests/training/gpu_check.py).
CUDA_GRAPHS = ("none", "full_iteration", "local")
# Some settings are refused until tests/training/gpu_check.py, which lifts this, has seen them train right on a GPU.
REFUSES_UNCHECKED = True
# The recipe of FP8 in which distillation was compared with 16 bits: 0.9 % apart in eight steps, `delayed` 1.1 %.
DISTILS_IN = "tensorwise"
# Fields whose flag is not the field's name with hyphens.
OTHER_FLAGS = {
    "fp8": "fp8-format",
    "fp4": "fp4-format",
    "rope_scaling": "use-rope-scaling",
    "heterogeneous_block_specs": "heterogeneous-layers-config-path",
    "quant_recipe": "te-precision-config-file",
}
# Attribute of a prepared configuration: the rows that the caller gives Megatron's pipeline schedule.
ROWS_GIVEN = "ksa_decoder_seq_length"


def _flag(field: str, value: object = None) -> str:
    flag = f"--{OTHER_FLAGS.get(field, field.replace('_', '-'))}"
    return flag if value is None else f"{flag} {value}"


def _field(field: str, value: object = None) -> str:
    return field if value is None else f"{field}={value}"


@dataclass(frozen=True)
class Spelling:
    """How an error names settings: as flags of the command line, or as fields of a `TransformerConfig`.

    Attributes:
        ksa: KSA.
        harpe: HARPE.
        name: a field of `TransformerConfig`, alone or with a value.
    """

    ksa: str
    harpe: str
    name: Callable[..., str]

    def feature(self, ksa: KSAConfig, bases: tuple[float, ...] | None) -> str:
        """What a setting does not go with; without KSA and HARPE, this project's model."""
        return self.ksa if ksa.enabled else self.harpe if bases else "KSAGPTModel"


FLAGS = Spelling("--ksa", "--position-embedding-type harpe", _flag)
FIELDS = Spelling("KSA", "HARPE", _field)


def prepare_config(
    config: TransformerConfig,
    ksa: KSAConfig,
    seq_length: int,
    *,
    bases: tuple[float, ...] | None = None,
    decoder_seq_length: int | None = None,
    distils: bool = False,
) -> TransformerConfig:
    """Check a configuration for `KSAGPTModel` and set in it what KSA and HARPE need.

    The configuration is changed in place, because Megatron's model chunks, schedule and optimizer share one object:
    `hetereogenous_dist_checkpoint` becomes True with KSA (layers have different parameters), `apply_rope_fusion` False
    (that kernel takes one row of angles), and with pipeline stages `variable_seq_lengths` True unless
    decoder_seq_length is given. Preparing a configuration twice is the same as once.

    Args:
        config: Megatron's, with the parallel sizes of the run.
        ksa: KSA settings; with `enabled` off, all layers are full attention.
        seq_length: n, text tokens in a training sequence.
        bases: HARPE bases, one for each KV group, or None.
        decoder_seq_length: the rows that you give Megatron's `forward_backward_func` under that name, which must be
            `pipeline_rows(ksa, seq_length)`; None lets pipeline stages tell each other their shapes.
        distils: the model is its own teacher (`KSAGPTModel.distill`).

    Returns:
        `config`.

    Raises:
        UsageError: a setting that would fail or have no effect, a pattern that does not fit the number of layers, or a
            length whose shards would cut a chunk.
    """
    check_settings(config, ksa, FIELDS, bases=bases)
    if distils:
        check_distillation(config, FIELDS.name)
    check_length(config, ksa, seq_length)
    rows = pipeline_rows(ksa, seq_length, distils=distils)
    if decoder_seq_length not in (None, rows):
        raise UsageError(f"decoder_seq_length is {decoder_seq_length}: text and summary rows are {rows}")
    if decoder_seq_length is not None:
        setattr(config, ROWS_GIVEN, rows)
    return set_required(config, ksa)


def pipeline_rows(ksa: KSAConfig, seq_length: int, *, distils: bool = False) -> int:
    """Rows of a whole sequence of seq_length text tokens that pipeline stages exchange.

    They are the text and its summaries, and with `distils` also the teacher's text.
    """
    return ksa.rows.total_rows(seq_length) + seq_length * distils


def set_required(config: TransformerConfig, ksa: KSAConfig) -> TransformerConfig:
    """Set, in place, what `prepare_config` says that it sets."""
    # Layers of different kinds have different parameters: Megatron must not stack them in checkpoints.
    config.hetereogenous_dist_checkpoint = config.hetereogenous_dist_checkpoint or ksa.enabled
    config.apply_rope_fusion = False
    if ksa.has_summaries and config.pipeline_model_parallel_size > 1 and getattr(config, ROWS_GIVEN, None) is None:
        if config.num_moe_experts and config.moe_token_dispatcher_type == "allgather":
            raise UsageError(
                "KSA on pipeline stages does not go with moe_token_dispatcher_type=allgather: use alltoall, or give "
                "prepare_config a decoder_seq_length"
            )
        config.variable_seq_lengths = True
    return config


def row_shards(config: Any) -> int:
    """Parts that context and sequence parallelism cut a sequence's rows into."""
    return config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def check_length(config: Any, ksa: KSAConfig, seq_length: int, micro_batch: int | None = None) -> None:
    """Refuse patterns and text lengths that do not fit; `config` as in `check_settings`.

    Args:
        micro_batch: sequences of a micro-batch, where they are known: FP8 takes some numbers of rows only.
    """
    if ksa.enabled:
        ksa.layers(config.num_layers, seq_length)
    check_shards(config, ksa, seq_length)
    if config.fp8 and micro_batch is not None:
        check_rows_in_fp8(ksa, seq_length, micro_batch, row_shards(config), "--seq-length")


def check_shards(config: Any, ksa: KSAConfig, seq_length: int) -> None:
    """Refuse a text length whose shards would cut a chunk; without KSA, tokens are chunks."""
    (ksa if ksa.enabled else dataclasses.replace(ksa, chunk_size=1)).check_sequence(
        seq_length,
        context_parallel=config.context_parallel_size,
        sequence_parallel=config.tensor_model_parallel_size if config.sequence_parallel else 1,
    )


def check_settings(
    config: Any,
    ksa: KSAConfig,
    spelling: Spelling,
    *,
    bases: tuple[float, ...] | None = None,
    position_embedding_type: str = "rope",
    rope_scaling: bool = False,
) -> None:
    """Refuse what this project's model cannot work with, or would silently leave without effect.

    Args:
        config: a `TransformerConfig`, or any object with its attributes.
        spelling: how errors name settings.
        bases: HARPE bases or None.
        rope_scaling: Llama 3's scaling of the rotary frequencies.

    Raises:
        UsageError: one line with the setting and the way out.
    """
    feature, name = spelling.feature(ksa, bases), spelling.name
    refused = [
        (bool(rope_scaling and bases), name("rope_scaling"), "HARPE's bases take its place; drop it"),
        *_refused_attention(config, name),
        *_refused_machinery(config, ksa, name),
        *refused_in_fp8(config, name),
        *_refused_by_the_fuser(config, name),
        *(_refused_until_run(config, name) if REFUSES_UNCHECKED else ()),
        *_refused_where_set(config, name),
    ]
    for active, setting, way_out in refused:
        if active:
            raise UsageError(f"{feature} does not go with {setting}: {way_out}")
    if position_embedding_type not in POSITION_TYPES:
        raise UsageError(
            f"{feature} needs explicit rotary positions, {name('position_embedding_type')} is "
            f"{position_embedding_type}: use rope, harpe or none"
        )
    if position_embedding_type == "harpe" and not bases:
        raise UsageError(f"{name('position_embedding_type', 'harpe')} needs the bases, one for each KV group")
    if bases and len(bases) != config.num_query_groups:
        raise UsageError(
            f"HARPE has {len(bases)} bases, the model has {config.num_query_groups} KV groups: give one base a group"
        )
    if config.context_parallel_size > 1:
        _check_context_parallel(config, feature, name)


Refusals = Iterator[tuple[bool, str, str]]


def _refused_attention(config: Any, name: Callable[..., str]) -> Refusals:
    """Kinds of attention: whether the setting is active, its name, and the way out."""
    dropout, softmax, variant = config.attention_dropout, config.softmax_type, config.experimental_attention_variant
    other_layers = "the layer specs are this project's own; drop it"
    yield bool(dropout), name("attention_dropout", dropout), f"use {name('attention_dropout', 0)}"
    yield config.multi_latent_attention, name("multi_latent_attention"), "it has no K/V heads to share; drop it"
    yield config.attention_output_gate, name("attention_output_gate"), "gated attention is not supported; drop it"
    yield config.flash_decode, name("flash_decode"), "it assumes one frequency row for all heads; drop it"
    yield config.window_size is not None, name("window_size"), "KSA's windows are those of KSAConfig; drop it"
    yield softmax != "vanilla", name("softmax_type", softmax), "attention here has no sink; drop it"
    yield config.qk_clip, name("qk_clip"), "attention here does not report its largest logit; drop it"
    yield config.log_max_attention_logit, name("log_max_attention_logit"), "attention here does not report it; drop it"
    yield variant is not None, name("experimental_attention_variant", variant), other_layers
    yield config.heterogeneous_block_specs, name("heterogeneous_block_specs"), other_layers
    yield config.num_moe_experts is None and config.qk_l2_norm, name("qk_l2_norm"), f"use {name('qk_layernorm')}"


def _refused_machinery(config: Any, ksa: KSAConfig, name: Callable[..., str]) -> Refusals:
    """Precision, further heads, schedules and CUDA graphs: as `_refused_attention`."""
    graphs = config.cuda_graph_impl
    unchecked = f"its summary projections are not checked in FP4; use {name('bf16')}"
    yield bool(config.mtp_num_layers), name("mtp_num_layers"), "multi-token prediction is not supported; drop it"
    yield bool(config.fp4), name("fp4"), unchecked
    yield (
        config.overlap_moe_expert_parallel_comm,
        name("overlap_moe_expert_parallel_comm"),
        ("its schedule runs Megatron's own layers; drop it"),
    )
    yield (
        config.external_cuda_graph or graphs == "transformer_engine",
        "CUDA graphs of Transformer Engine",
        "it captures layers with inputs of the text's length, which summary rows exceed; use "
        f"{name('cuda_graph_impl', 'full_iteration')} or local",
    )
    yield (
        config.tp_comm_overlap and ksa.has_summaries,
        name("tp_comm_overlap"),
        "its buffers have the text's rows, which summary rows exceed; drop it",
    )
    yield graphs not in CUDA_GRAPHS, name("cuda_graph_impl", graphs), f"use {', '.join(CUDA_GRAPHS)}"


def _refused_by_the_fuser(config: Any, name: Callable[..., str]) -> Refusals:
    """What Transformer Engine's fused MLP does not go with: as `_refused_attention`."""
    fuses, te = name("use_transformer_engine_op_fuser"), name("transformer_impl", "transformer_engine")
    fuser = config.use_transformer_engine_op_fuser
    yield fuser and config.transformer_impl != "transformer_engine", f"{fuses} without {te}", f"use {te}"
    yield bool(fuser and config.num_moe_experts), f"{fuses} and experts", "it fuses dense MLPs; drop it"


def _refused_until_run(config: Any, name: Callable[..., str]) -> Refusals:
    """What no GPU has been seen to train right: as `_refused_attention`."""
    graphs = name("cuda_graph_impl", config.cuda_graph_impl)
    if config.enable_cuda_graph:
        graphs = name("enable_cuda_graph")
    yield (
        bool(_captures(config) and config.context_parallel_size > 1),
        f"{graphs} and {name('context_parallel_size', config.context_parallel_size)}",
        f"its exchange was not captured on several GPUs yet; use {name('cuda_graph_impl', 'none')}",
    )


def _captures(config: Any) -> bool:
    """Whether anything runs in CUDA graphs."""
    return bool(config.enable_cuda_graph or config.cuda_graph_impl != "none")


def check_distillation(config: Any, name: Callable[..., str]) -> None:
    """Refuse distillation in CUDA graphs, and in FP8 whose losses were not near those in 16 bits on a GPU.

    Args:
        config: as in `check_settings`.
        name: how an error names a setting.

    Raises:
        UsageError: one line with the setting and the way out.
    """
    if _captures(config):
        raise UsageError(
            "distillation does not go with CUDA graphs: a graph holds one pass of a layer, and here are two; use "
            f"{name('cuda_graph_impl', 'none')}"
        )
    recipe = fp8_recipe(config) if config.fp8 else DISTILS_IN
    if recipe != DISTILS_IN and REFUSES_UNCHECKED:
        raise UsageError(
            f"distillation does not go with {name('fp8_recipe', recipe)}: its losses were not within 1 % of those in "
            f"16 bits; use {name('fp8_recipe', DISTILS_IN)}, or 16 bits"
        )


def _refused_where_set(config: Any, name: Callable[..., str]) -> Refusals:
    """Switches of Megatron that are off by default; arguments lack those that have no flag."""
    attention = "it is about attention that Megatron builds, and this is the project's own; drop it"
    apart = "it takes layers apart in a way that this project's attention does not; drop it"
    offloading = f"offloading is not checked with this project's attention; use {name('recompute_granularity')}"
    ways_out = {
        "batch_invariant_mode": attention,
        "use_kitchen_attention": attention,
        "fused_single_qkv_rope": "heads are rotated by this project's kernel; drop it",
        "mrope_section": "positions are rows of one number; drop it",
        "quant_recipe": f"its attention and summary projections are not checked in low precision; use {name('bf16')}",
        "cpu_offloading": offloading,
        "fine_grained_activation_offloading": offloading,
        "delay_wgrad_compute": apart,
        "overlap_dispatch_backward_with_experts_wgrad": apart,
        "init_model_with_meta_device": "the layer specs are this project's own; drop it",
    }
    for field, way_out in ways_out.items():
        yield bool(getattr(config, field, None)), name(field), way_out


def _check_context_parallel(config: Any, feature: str, name: Callable[..., str]) -> None:
    """Refuse the kinds of context parallelism that exist for Transformer Engine's attention only."""
    size, tp = config.context_parallel_size, config.tensor_model_parallel_size
    if config.hybrid_context_parallel:
        raise UsageError(f"{feature} does not go with {name('hybrid_context_parallel')}: drop it")
    kinds = [config.cp_comm_type] if isinstance(config.cp_comm_type, str | None) else config.cp_comm_type
    for kind in kinds:
        if kind not in (None, *CP_COMM_TYPES):
            raise UsageError(
                f"{feature} does not go with {name('cp_comm_type', kind)}: use p2p (halos and gathered summaries) "
                "or a2a"
            )
    if "a2a" not in kinds:
        return
    heads, groups = config.num_attention_heads // tp, max(config.num_query_groups // tp, 1)
    if heads % size:
        largest = max(divisor for divisor in range(1, heads + 1) if heads % divisor == 0 and divisor <= size)
        raise UsageError(
            f"{name('cp_comm_type', 'a2a')} divides the {heads} attention heads of a tensor-parallel rank among "
            f"{name('context_parallel_size', size)} ranks: use {largest}, or p2p"
        )
    if groups % size and size % groups:
        raise UsageError(
            f"{name('cp_comm_type', 'a2a')} needs the {groups} K/V heads of a tensor-parallel rank to be a multiple or "
            f"a divisor of {name('context_parallel_size', size)}: use {groups}, or p2p"
        )
