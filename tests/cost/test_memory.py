"""Theoretical memory against models, optimizers and saved tensors that exist."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from processes import run_processes
from single_process import build_model, process_groups, random_tokens, transformer_config
from torch.autograd.graph import saved_tensors_hooks

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import EVERY, FULL, NONE, Recompute
from megatron_ksa.cost import memory
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.model.builder import KSAGPTModelBuilder, KSAGPTModelConfig
from megatron_ksa.model.chunked_loss import ChunkedLoss
from megatron_ksa.model.recompute import set_recompute
from megatron_ksa.model.summary_parameters import freeze_shared_parameters
from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform

HYBRID = KSAConfig(enabled=True, chunk_size=8, window_chunks="1", layer_pattern="kklf")
N, WORDS = 128, 96
# What is computed again cheaply takes the hooks that count here: test_gpu_memory.py counts what lives.
RECOMPUTES = [
    NONE, Recompute(modules=("core_attn",)), Recompute(modules=("mlp",)), Recompute(1), Recompute(3),
    Recompute(1, modules=("mlp",)), FULL, Recompute(EVERY, 2),
]  # fmt: skip


def shape(ksa: KSAConfig = HYBRID, **changes) -> ModelShape:
    """The shape of `single_process.transformer_config`."""
    sizes = dict(num_layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocabulary=WORDS, qk_norm=True)
    return ModelShape(ksa=ksa, **{**sizes, **changes})


def layout(**changes) -> TrainingLayout:
    """Float32 and no fusion, as on a CPU."""
    plain = dict(parameter_bytes=4, fused_norm=False, fused_swiglu=False, fused_attention=False)
    return TrainingLayout(text_length=N, **{**plain, **changes})


@pytest.mark.parametrize(
    ("ksa", "config", "model", "changes"),
    [
        (HYBRID, {}, {}, {}),
        (KSAConfig(), {}, {}, {}),
        (HYBRID, {"qk_layernorm": False, "normalization": "LayerNorm"}, {}, {"qk_norm": False, "norm_vectors": 2}),
        (HYBRID, {"add_bias_linear": True}, {}, {"bias": True}),
        (HYBRID, {"add_qkv_bias": True}, {}, {"qkv_bias": True}),
        (HYBRID, {}, {"share_embeddings_and_output_weights": True}, {"tied": True}),
        (KSAConfig(enabled=True, independent_qk_norm=True, independent_layernorm=True, summary_tokens=2), {}, {}, {}),
        (KSAConfig(enabled=True, independent_projections=False), {}, {}, {}),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model(ksa, config, model, changes):
    settings = {"share_embeddings_and_output_weights": False, "vocab_size": WORDS, **model}
    built = build_model(ksa, transformer_config(**config), **settings)
    counted = sum(parameter.numel() for parameter in built.parameters())
    assert memory.stage_parameters(shape(ksa, **changes), layout(), 0) == counted


def saved_bytes(model: torch.nn.Module, micro_batch: int, length: int = N) -> int:
    """Bytes of the storages that autograd saves in a forward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    tokens, loss = random_tokens(micro_batch, length), ChunkedLoss(LossConfig(8))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(length).expand(micro_batch, length), labels=tokens, output_processor=loss)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


# Settings of the KSA layers and the model's configuration, and what they change in its shape and layout.
KINDS = {
    "every kind": (HYBRID, {}, {}, {}),
    "windows": (dataclasses.replace(HYBRID, layer_pattern="wkwf"), {}, {}, {}),
    "full attention": (KSAConfig(), {}, {}, {}),
    "two summaries": (dataclasses.replace(HYBRID, summary_tokens=2), {}, {}, {}),
    "no head norm": (HYBRID, {"qk_layernorm": False}, {"qk_norm": False}, {}),
    "no groups": (HYBRID, {"num_query_groups": 4}, {"kv_heads": 4}, {}),
    "no gate": (
        HYBRID, {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}, {"gated": False}, {}
    ),
    "fused SwiGLU": (HYBRID, {"bias_activation_fusion": True}, {}, {"fused_swiglu": True}),
    "layer norm": (HYBRID, {"normalization": "LayerNorm"}, {"norm_vectors": 2}, {"fused_norm": True}),
    "norms apart": (dataclasses.replace(HYBRID, independent_qk_norm=True, independent_layernorm=True), {}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "bases"), [*((kind, None) for kind in KINDS), ("every kind", (1e4, 1e5)), ("no head norm", (1e4, 1e5))]
)
def test_activations_are_the_saved_tensors(kind, bases):
    """To the byte, but for a number that Megatron saves for each recomputed attention (its kind of mask)."""
    process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    ksa, config, changes, path = KINDS[kind]
    model = build_model(
        ksa, transformer_config(**config), bases=bases, vocab_size=WORDS, text_length=N,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    sizes = shape(ksa, angles_per_head=bases is not None, **changes)
    for recompute in RECOMPUTES:
        set_recompute(model, recompute)
        plan = layout(recompute=recompute, micro_batch=2, loss=LossConfig(8), **path)
        expected = memory.saved_activations(sizes, plan, 0)
        assert saved_bytes(model, 2) == pytest.approx(expected, abs=4 * 4), str(recompute)


# Kind of exchange, layers, and how far the model may be off.
CONTEXTS = (("p2p", "kwkw", 0), ("p2p", "kwlf", 0), ("a2a", "kwlf", 0.0125))


def saved_in_context_parallel() -> list[int]:
    """Bytes that this rank of two saves of a model in each of CONTEXTS."""
    activate_cpu_platform()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    groups, found = ProcessGroupCollection.use_mpu_process_groups(), []
    for comm, pattern, _ in CONTEXTS:
        config = transformer_config(context_parallel_size=2, cp_comm_type=comm)
        settings = KSAGPTModelConfig(
            vocab_size=WORDS, seq_length=N, text_length=N, position_embedding_type="rope",
            ksa=dataclasses.replace(HYBRID, layer_pattern=pattern), share_embeddings_and_output_weights=False,
            transformer=config,
        )  # fmt: skip
        found.append(saved_bytes(KSAGPTModelBuilder(settings).build_model(groups), 2, N // 2))
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.slow
def test_saved_tensors_under_context_parallelism(tmp_path):
    """Halos and gathered summaries were not counted; an empty halo kept all that had been received."""
    ranks = run_processes(saved_in_context_parallel, 2, tmp_path)
    for (comm, pattern, error), *found in zip(CONTEXTS, *ranks, strict=True):
        plan = layout(micro_batch=2, loss=LossConfig(8), context_parallel=2, context_comm=(comm,))
        expected = memory.saved_activations(shape(dataclasses.replace(HYBRID, layer_pattern=pattern)), plan, 0)
        assert max(found) == pytest.approx(expected, rel=error)


def measured() -> list[list[int]]:
    """[parameters, gradient bytes, optimizer bytes] with two data-parallel and with two tensor-parallel ranks."""
    activate_cpu_platform()
    results = []
    for tp in (1, 2):
        parallel_state.initialize_model_parallel(tp)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = transformer_config(tensor_model_parallel_size=tp, bf16=True, params_dtype=torch.bfloat16)
        settings = KSAGPTModelConfig(
            vocab_size=WORDS, seq_length=N, text_length=N, position_embedding_type="rope", ksa=HYBRID,
            share_embeddings_and_output_weights=False, transformer=config,
        )  # fmt: skip
        built = KSAGPTModelBuilder(settings).build_model(groups).bfloat16()
        model = DistributedDataParallel(
            config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), built
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, bf16=True, use_distributed_optimizer=True, params_dtype=torch.bfloat16
            ),
            [model],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        optimizer.step()
        adam = optimizer.chained_optimizers[0].optimizer
        state = [value for held in adam.state.values() for name, value in held.items() if name != "step"]
        state += [parameter for group in adam.param_groups for parameter in group["params"]]
        results.append(
            [
                sum(parameter.numel() for parameter in built.parameters()),
                sum(buffer.grad_data.nbytes for buffer in model.buffers),
                sum(tensor.numel() * tensor.element_size() for tensor in state),
            ]
        )
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.slow
def test_optimizer_state_and_gradients_of_two_ranks(tmp_path):
    """The distributed optimizer starts every parameter at a multiple of 64 elements, so that buffers are larger."""
    for data, tensor in run_processes(measured, 2, tmp_path):
        for found, sizes in ((data, {"data_parallel": 2}), (tensor, {"tensor_parallel": 2})):
            expected = memory.stage_memory(shape(), layout(parameter_bytes=2, **sizes), 0)
            assert found[0] == expected.num_parameters
            assert found[1] == pytest.approx(expected.gradients, rel=0.05)
            assert found[2] == pytest.approx(expected.optimizer, rel=0.05)


def test_stages_share_the_model():
    whole = layout()
    for virtual in (1, 2):
        plan = layout(pipeline_parallel=2, virtual_stages=virtual, num_micro_batches=8)
        parts = [memory.stage_parameters(shape(), plan, stage) for stage in range(2)]
        assert sum(parts) == memory.stage_parameters(shape(), whole, 0)
    plan = layout(pipeline_parallel=4, num_micro_batches=8)
    assert [memory.in_flight(plan, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert memory.in_flight(layout(pipeline_parallel=4, num_micro_batches=2), 0) == 2
    # Three pairs of stages ahead in two chunks: (2 * 3 + 4 + 1) / 2.
    assert memory.in_flight(layout(pipeline_parallel=4, virtual_stages=2, num_micro_batches=8), 0) == 5.5


def test_logits_and_the_report():
    """Two chunks' logits exist at once, beside the gradient of the hidden states and 16 bytes a token."""
    whole, chunks = layout(loss=LossConfig(0)), layout(loss=LossConfig(64), fused_gradient=True)
    assert memory.loss_working(shape(), whole) == N * WORDS * 4
    assert memory.loss_working(shape(), chunks) == 2 * 64 * WORDS * 4 + N * (4 * 32 + 16)
    said = memory.report(shape(), layout(loss=LossConfig(16), pipeline_parallel=2))
    assert "of pipeline stage 0" in said and "nothing recomputed" in said and "\n" not in said
    said = memory.report(shape(), layout(loss=LossConfig(64)))
    assert "more in the loss in chunks of 64 tokens" in said


def test_a_stage_that_trains_summaries_alone():
    """Gradients and optimizer state of the frozen model's trainable parameters, and the teacher's outputs."""
    ksa = dataclasses.replace(HYBRID, independent_qk_norm=True, independent_layernorm=True)
    model = build_model(ksa, vocab_size=WORDS)
    freeze_shared_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kinds = shape(ksa, tied=model.share_embeddings_and_output_weights)
    plan = layout(train="summary")
    assert memory.trained_parameters(kinds, plan, 0) == trained
    assert memory.stage_memory(kinds, plan, 0).optimizer == 8 * trained
    teacher = memory.stage_memory(kinds, layout(train="summary", distills=True, loss=LossConfig(0)), 0).activations
    # Three KSA layers, the rows of the input and the final states, float32.
    plain = memory.stage_memory(kinds, layout(train="summary", loss=LossConfig(0)), 0).activations
    assert teacher - plain == 5 * 4 * N * 32
    on_host = [
        layout(train="summary", recompute=FULL, teacher_on_host=host, distills=True, loss=LossConfig(0))
        for host in (False, True)
    ]
    on_gpu, rest = (memory.stage_memory(kinds, each, 0).activations for each in on_host)
    # The three layers' outputs are left on the host.
    assert on_gpu - rest == 3 * 4 * N * 32
