"""What a configuration object is refused for, and what is set in it, without the trainer."""

import dataclasses

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from single_process import VOCABULARY, process_groups, transformer_config

from megatron_ksa import KSAConfig, KSAGPTModel, ksa_block_spec, pipeline_rows, prepare_config
from megatron_ksa.errors import UsageError
from megatron_ksa.model import prepare
from megatron_ksa.model.low_precision import check_rows_in_fp8
from megatron_ksa.training.megatron_flags import WITHOUT_KSA

KSA = KSAConfig(enabled=True, layer_pattern="kkkf")
ANNEALED = dataclasses.replace(KSA, anneal_start=5, anneal_end=9)
OFF = KSAConfig()
BASES = (1e4, 1e5)
FP8 = {"fp8": "hybrid", "fp8_recipe": "delayed", "transformer_impl": "transformer_engine", "bf16": True}
REFUSED = [
    ({"attention_dropout": 0.1}, "KSA does not go with attention_dropout=0.1: use attention_dropout=0"),
    ({"attention_output_gate": True}, "KSA does not go with attention_output_gate: "),
    ({"flash_decode": True}, "flash_decode: it assumes one frequency row"),
    ({"window_size": (8, 0)}, "window_size: KSA's windows are those of KSAConfig"),
    ({"softmax_type": "learnable"}, "softmax_type=learnable: attention here has no sink"),
    ({"qk_clip": True}, "qk_clip: "),
    ({"log_max_attention_logit": True}, "log_max_attention_logit: "),
    ({"experimental_attention_variant": "gated_delta_net"}, "experimental_attention_variant=gated_delta_net: "),
    ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs: "),
    ({"qk_l2_norm": True}, "qk_l2_norm: use qk_layernorm"),
    ({"batch_invariant_mode": True}, "batch_invariant_mode: it is about attention that Megatron builds"),
    ({"use_kitchen_attention": True}, "use_kitchen_attention: it is about attention that Megatron builds"),
    ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope: heads are rotated by this project's kernel"),
    ({"mrope_section": [2, 1, 1]}, "mrope_section: positions are rows of one number"),
    ({"quant_recipe": "a recipe"}, "quant_recipe: .* low precision; use bf16"),
    ({"cpu_offloading": True}, "cpu_offloading: offloading is not checked .*; use recompute_granularity"),
    ({"fine_grained_activation_offloading": True}, "fine_grained_activation_offloading: offloading is not checked"),
    ({"delay_wgrad_compute": True}, "delay_wgrad_compute: it takes layers apart"),
    ({"overlap_dispatch_backward_with_experts_wgrad": True}, "experts_wgrad: it takes layers apart"),
    ({"init_model_with_meta_device": True}, "init_model_with_meta_device: the layer specs"),
    ({"mtp_num_layers": 1}, "mtp_num_layers: "),
    ({"fp8": "hybrid"}, "fp8 without transformer_impl=transformer_engine: use transformer_impl=transformer_engine"),
    ({**FP8, "fp8_recipe": "mxfp8"}, "fp8_recipe=mxfp8: use delayed, tensorwise or blockwise, which were compared"),
    ({**FP8, "bf16": False}, "fp8 without bf16: use bf16"),
    ({**FP8, "fp8_param": True}, "weights kept in FP8 .*were not compared with 16 bits; drop it"),
    ({**FP8, "fp8_dot_product_attention": True}, "fp8_dot_product_attention: attention stays in 16 bits"),
    ({**FP8, "fp8_multi_head_attention": True}, "fp8_multi_head_attention: attention stays in 16 bits"),
    ({**FP8, "use_transformer_engine_op_fuser": True}, "in FP8 of fp8_recipe=delayed: .*fp8_recipe=tensorwise"),
    (
        {"context_parallel_size": 2, "cuda_graph_impl": "local"},
        "cuda_graph_impl=local and context_parallel_size=2: its exchange was not captured on several GPUs yet",
    ),
    ({"use_transformer_engine_op_fuser": True}, "op_fuser without transformer_impl=transformer_engine: use"),
    (
        {"transformer_impl": "transformer_engine", "num_moe_experts": 2, "use_transformer_engine_op_fuser": True},
        "use_transformer_engine_op_fuser and experts: it fuses dense MLPs",
    ),
    ({"fp4": "e2m1"}, "fp4: .*FP4; use bf16"),
    ({"tp_comm_overlap": True}, "tp_comm_overlap: its buffers have the text's rows, which summary rows exceed"),
    ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm: "),
    ({"cuda_graph_impl": "transformer_engine"}, "CUDA graphs of Transformer Engine: .*the text's length"),
    ({"cuda_graph_impl": "other"}, "cuda_graph_impl=other: use none, full_iteration, local"),
    ({"context_parallel_size": 2, "cp_comm_type": "all_gather"}, "cp_comm_type=all_gather: use p2p .*or a2a"),
    ({"context_parallel_size": 2, "hybrid_context_parallel": True}, "hybrid_context_parallel: drop it"),
    ({"context_parallel_size": 3, "cp_comm_type": ["a2a"] * 4}, "context_parallel_size=3 ranks: use 2, or p2p"),
]


# Fields whose flags the trainer refuses with KSA, and that a configuration may hold. Most act only beside a field that
# is refused. Others choose kernels or an order of operations, and the model is the same; no_rope_freq works.
UNREFUSED = {
    "attention_backend", "apply_query_key_layer_scaling", "no_rope_freq", "test_mode", "flash_attention_version",
    "hierarchical_context_parallel_sizes", "kitchen_attention_backend", "window_attn_skip_freq", "qk_clip_alpha",
    "qk_clip_threshold", "offload_modules", "min_offloaded_tensor_size", "delay_offload_until_cuda_graph",
    "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction", "cpu_offloading_num_layers",
    "cpu_offloading_retain_pinned_cpu_buffers", "fine_grained_offloading_max_inflight_offloads",
    "ep_overlap_early_attn_memory_release", "high_priority_a2a_comm_stream",
    "fused_residual_rmsnorm", "use_grouped_gemm_for_dense_mlp",
    "use_te_activation_func",
}  # fmt: skip
PARTS_OF_REFUSED = ("dsa_", "linear_", "mtp_", "fp8_", "fp4_")


def test_what_the_trainer_refuses_as_a_flag_is_refused_or_known_to_be_harmless_as_a_field():
    """The flags' list had grown past this one: a configuration with offloading or Kitchen's attention passed."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    flags = {flag.removeprefix("--").replace("-", "_") for refused in WITHOUT_KSA for flag in refused.flags}
    refused = {name for names, _ in REFUSED for name in names}
    left = {name for name in (flags & fields) - refused - UNREFUSED if not name.startswith(PARTS_OF_REFUSED)}
    assert not left


def changed(fields):
    """A configuration with fields set after Megatron's own checks, so that this project's list is what is tested."""
    config = transformer_config()
    for name, value in fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[next(reversed(fields)) for fields, _ in REFUSED])
def test_refused_in_one_line_by_prepare_config_and_by_the_model(fields, message):
    """Without the trainer attention dropout, windows and attention sinks were accepted and had no effect."""
    with pytest.raises(UsageError, match=message) as error:
        prepare_config(changed(fields), KSA, 96)
    assert "\n" not in str(error.value)
    process_groups()
    with pytest.raises(UsageError, match=message):
        KSAGPTModel(changed(fields), KSA, 96, vocab_size=VOCABULARY)


def test_multi_latent_attention_is_refused():
    config = MLATransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    with pytest.raises(UsageError, match="KSA does not go with multi_latent_attention: "):
        prepare_config(config, KSA, 96)


@pytest.mark.parametrize("attention", ["ksa", "full", "window"])
def test_core_attention_refuses_dropout(attention):
    """A block spec in another model was built with dropout and ran without."""
    process_groups()
    layer = {"ksa": 0, "full": 3, "window": 2}[attention]
    spec = ksa_block_spec(transformer_config(), KSAConfig(enabled=True, layer_pattern="kkwf"), 64).layer_specs[layer]
    build = spec.submodules.self_attention.submodules.core_attention
    settings = {"layer_number": 1, "attn_mask_type": None, "attention_type": "self"}
    build(config=transformer_config(), **settings)
    with pytest.raises(UsageError, match="attention_dropout is 0.2: use 0"):
        build(config=transformer_config(attention_dropout=0.2), **settings)


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({}, 60, "60 is not a multiple of 8 .*: use 56 or 64"),
        ({"context_parallel_size": 2}, 72, "72 is not a multiple of .*= 32: use 64 or 96"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 72, "72 is not a multiple of .*: use 64 or 80"),
        ({"num_layers": 3}, 64, "describes 4 layers, the model has 3"),
    ],
)
def test_lengths_and_patterns_that_do_not_fit(fields, length, message):
    with pytest.raises(UsageError, match=message):
        prepare_config(changed(fields), KSA, length)


def test_what_is_set():
    config = changed({"apply_rope_fusion": True})
    assert prepare_config(config, KSA, 64) is config
    assert config.hetereogenous_dist_checkpoint and not config.apply_rope_fusion and not config.variable_seq_lengths
    assert not prepare_config(changed({}), OFF, 63, bases=BASES).hetereogenous_dist_checkpoint


def test_pipeline_stages_exchange_the_rows_that_the_schedule_is_given():
    """Megatron's schedule took text rows for granted: the next stage's receive did not fit."""
    staged = {"pipeline_model_parallel_size": 2}
    assert pipeline_rows(KSA, 64) == 72 and pipeline_rows(OFF, 64) == 64
    assert prepare_config(changed(staged), KSA, 64).variable_seq_lengths
    told = prepare_config(changed(staged), KSA, 64, decoder_seq_length=72)
    assert not told.variable_seq_lengths and not prepare_config(told, KSA, 64).variable_seq_lengths
    assert not prepare_config(changed(staged), OFF, 64, bases=BASES).variable_seq_lengths
    with pytest.raises(UsageError, match="decoder_seq_length is 64: text and summary rows are 72"):
        prepare_config(changed(staged), KSA, 64, decoder_seq_length=64)
    with pytest.raises(UsageError, match="moe_token_dispatcher_type=allgather: use alltoall"):
        prepare_config(changed({**staged, "num_moe_experts": 2}), KSA, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is learned_absolute: use rope"),
        ({"position_embedding_type": "harpe"}, "position_embedding_type=harpe needs the bases"),
        ({"bases": (1e4, 1e5, 1e6)}, "HARPE has 3 bases, the model has 2 KV groups"),
        ({"bases": BASES, "rope_scaling": True}, "rope_scaling: HARPE's bases take its place"),
    ],
)
def test_positions_that_the_model_does_not_have(settings, message):
    """Another position type got rotary angles without a word, and bases switched rope scaling off."""
    process_groups()
    with pytest.raises(UsageError, match=message):
        KSAGPTModel(transformer_config(), KSA, 64, vocab_size=VOCABULARY, **settings)


def test_the_model_sets_what_its_configuration_lacks():
    process_groups()
    model = KSAGPTModel(transformer_config(), KSA, 64, vocab_size=VOCABULARY)
    assert model.config.hetereogenous_dist_checkpoint
    assert model.max_sequence_length == 64 and model.rotary.bases == (10000,)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", Fp8Recipe.delayed])
def test_fp8_and_graphs_of_annealed_models_are_accepted(recipe):
    """FP8 was refused as a whole, then with annealing, experts and graphs of layers; CUDA graphs with annealing."""
    of_recipe = {**FP8, "fp8_recipe": recipe}
    prepare_config(changed({**of_recipe, "num_moe_experts": 2}), KSA, 128)
    for graphs in ("full_iteration", "local"):
        prepare_config(changed({**of_recipe, "cuda_graph_impl": graphs}), ANNEALED, 128)
        prepare_config(changed({"cuda_graph_impl": graphs}), ANNEALED, 128)


@pytest.mark.parametrize("graphs", ["full_iteration", "local"])
def test_distillation_in_graphs_is_refused(graphs):
    """The trainer alone refused it: a library's user would have trained on a teacher that no replay fills."""
    with pytest.raises(UsageError, match="distillation does not go with CUDA graphs: .*use cuda_graph_impl=none"):
        prepare_config(changed({"cuda_graph_impl": graphs}), KSA, 128, distils=True)


def test_what_no_gpu_has_run_is_refused_until_the_checks_lift_it(monkeypatch):
    graphs = {"cuda_graph_impl": "full_iteration", "context_parallel_size": 2}
    refused = [(FP8, KSA, {"distils": True}), (graphs, KSA, {})]
    for fields, ksa, options in refused:
        with pytest.raises(UsageError, match="not within 1 % .*use fp8_recipe=tensorwise|yet; use "):
            prepare_config(changed(fields), ksa, 128, **options)
    prepare_config(changed({**FP8, "fp8_recipe": "tensorwise"}), KSA, 128, distils=True)
    monkeypatch.setattr(prepare, "REFUSES_UNCHECKED", False)
    for fields, ksa, options in refused:
        prepare_config(changed(fields), ksa, 128, **options)


@pytest.mark.parametrize(
    ("length", "batch", "shards", "nearest"),
    [
        (64, 1, 1, "use 128,"), (192, 1, 1, "use 128 or 256"), (64, 2, 1, None), (128, 1, 1, None), (8192, 1, 8, None),
        (8192 + 64, 1, 1, "use 8192 or 8320"), (128, 1, 2, "use 256,"), (192, 3, 1, "use 128 or 256"),
    ],
)  # fmt: skip
def test_rows_that_fp8_does_not_take_are_refused(length, batch, shards, nearest):
    """Products over rows that are no multiple of 16 end in an error of cuBLAS that names no flag: 8 rows a chunk."""
    if nearest is None:
        check_rows_in_fp8(KSA, length, batch, shards, "--seq-length")
        return
    with pytest.raises(UsageError, match=f"16 text rows and 16 summary rows .*--seq-length {length} .*{nearest}"):
        check_rows_in_fp8(KSA, length, batch, shards, "--seq-length")
    # Without summaries text rows alone count.
    check_rows_in_fp8(OFF, length, batch, shards, "--seq-length")


def test_a_model_in_fp8_refuses_other_lengths_too():
    """A library's user, and an evaluation, may give a length that the flags did not say."""
    process_groups()
    model = KSAGPTModel(transformer_config(), KSA, 128, vocab_size=VOCABULARY)
    tokens = torch.zeros(1, 64, dtype=torch.long)
    model(tokens, torch.arange(64)[None])
    model.config.fp8 = "hybrid"
    with pytest.raises(UsageError, match="a length of 64 has others: use 128, or 16 bits"):
        model(tokens, torch.arange(64)[None])
