"""Tensors that are computed again in place of being saved: the same bits, and less that lives."""

import dataclasses

import pytest
import torch
from megatron.core import tensor_parallel
from single_process import build_model, process_groups, random_tokens, transformer_config

import megatron_ksa.model.gpt
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import CHEAP, FULL, NONE, Recompute
from megatron_ksa.cost.live_memory import LiveMemory
from megatron_ksa.model.chunked_loss import ChunkedLoss
from megatron_ksa.model.distillation_loss import DistillationLoss
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.model.recompute import set_recompute
from megatron_ksa.model.saved_again import can_recompute

N, WORDS = 64, 96
KSA = KSAConfig(enabled=True, chunk_size=8, window_chunks="1", layer_pattern="klwf")
MODELS = {
    "norms apart": (dataclasses.replace(KSA, independent_layernorm=True, independent_qk_norm=True), {}),
    "biases": (KSA, {"add_bias_linear": True, "bias_activation_fusion": True}),
}


@pytest.fixture(autouse=True)
def positions(monkeypatch):
    """Heads are rotated by positions, as on a GPU, here by the reference."""
    process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    monkeypatch.setattr(megatron_ksa.model.gpt, "uses_triton", lambda op, rows: True)


def built(ksa: KSAConfig, config: dict, **model) -> KSAGPTModel:
    return build_model(
        ksa, transformer_config(**config), vocab_size=WORDS, text_length=N,
        share_embeddings_and_output_weights=False, **model,
    )  # fmt: skip


def train(model: KSAGPTModel, recompute: Recompute, distill: DistillConfig | None = None) -> tuple[list, int]:
    """Loss and gradients of two micro-batches, and the bytes that live before the first loss."""
    set_recompute(model, recompute)
    model.zero_grad()
    loss = ChunkedLoss(LossConfig(8)) if distill is None else DistillationLoss(LossConfig(8), distill)
    memory, live, losses = LiveMemory(), [], []

    def counted(**kwargs) -> torch.Tensor:
        live.append(memory.live)
        result = loss(**kwargs)
        return result if distill is None else result.total

    memory.count(model.parameters(), free=True)
    for seed in range(2):
        tokens = random_tokens(2, N, seed)
        with memory:
            total = model(tokens, torch.arange(N).expand(2, N), labels=tokens, output_processor=counted).sum()
            total.backward()
        losses.append(total.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)], live[0]


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_keep_their_bits_and_less_lives(kind):
    ksa, config = MODELS[kind]
    model = built(ksa, config)
    assert {can_recompute(layer) for layer in model.decoder.layers} == {CHEAP}
    plain, most = train(model, NONE)
    one_by_one = [Recompute(cheap=(name,)) for name in CHEAP] if kind == "norms apart" else []
    for recompute in (*one_by_one, Recompute(1, cheap=CHEAP)):
        again, live = train(model, recompute)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), str(recompute)
        assert live < most, str(recompute)
    again, live = train(model, NONE)
    assert live == pytest.approx(most, abs=100) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_megatron_recomputes_is_set_in_place():
    """Flags are read where a layer is made: a model that is built is changed as a whole."""
    model = built(KSA, {})
    plain, most = train(model, NONE)
    for recompute in (Recompute(modules=("mlp",)), Recompute(2, modules=("mlp",), cheap=("norms",)), FULL):
        again, live = train(model, recompute)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), str(recompute)
        assert live < most


def test_a_teachers_pass_keeps_its_own():
    distill = DistillConfig(enabled=True)
    model = built(KSA, {}, train="summary", distill=distill)
    model.distillation.set_scale(1.0)
    plain, _ = train(model, NONE, distill)
    again, _ = train(model, Recompute(1, cheap=CHEAP), distill)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_layers_say_what_they_can_compute_again():
    other = built(KSA, {"qk_layernorm": False, "gated_linear_unit": False, "activation_func": torch.nn.functional.gelu})
    assert {can_recompute(layer) for layer in other.decoder.layers} == {("norms",)}


def test_a_second_backward_pass_computes_again():
    model = built(KSA, {})
    set_recompute(model, Recompute(cheap=CHEAP))
    tokens, processor = random_tokens(1, N), ChunkedLoss(LossConfig(8))
    loss = model(tokens, torch.arange(N).expand(1, N), labels=tokens, output_processor=processor).sum()
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    set_recompute(model, NONE)
    model(tokens, torch.arange(N).expand(1, N), labels=tokens, output_processor=processor).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
