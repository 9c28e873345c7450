"""A model that is its own teacher: the teacher is the dense model, losses and gradients are those of float64."""

import dataclasses

import pytest
import torch
from compare import assert_close
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.distillation_loss import DistillationLoss, TokenLosses
from megatron_ksa.model.summary_parameters import freeze_shared_parameters, is_summary_parameter

KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="klkf")
DENSE = KSAConfig(enabled=False)
LENGTH, BATCH, ROWS = 32, 2, 10
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def distilled(config: DistillConfig, ksa: KSAConfig = KSA, dtype=torch.float64, **changes):
    """A KSA model that teaches itself, with summary parameters that differ from the shared ones."""
    model = build_model(ksa, transformer_config(**changes)).to(dtype)
    freeze_shared_parameters(model)
    model.distill(config, ksa.num_summarised(4))
    return model


def losses_of(model, config: DistillConfig, seed: int = 0, rows: int = ROWS) -> TokenLosses:
    tokens, labels = random_tokens(BATCH, LENGTH, seed), random_tokens(BATCH, LENGTH, seed + 1)
    return TokenLosses(*model(tokens, None, labels=labels, output_processor=DistillationLoss(LossConfig(rows), config)))


def attention_outputs(model, tokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and each attention's output after the projection, of a plain forward pass."""
    outputs, handles = [], []
    for layer in model.decoder.layers:
        handles.append(layer.self_attention.register_forward_hook(lambda module, args, out: outputs.append(out[0])))
    logits = model(tokens, None)
    for handle in handles:
        handle.remove()
    return logits, outputs


def expected_losses(config: DistillConfig, dense, student, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """CE, KL, attention term and cosine, written down from the recipe: two models, whole logits."""
    tokens, labels = random_tokens(BATCH, LENGTH, seed), random_tokens(BATCH, LENGTH, seed + 1)
    with torch.no_grad():
        teacher_logits, teacher = attention_outputs(dense, tokens)
    logits, ours = attention_outputs(student, tokens)
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    ce = -log_q.gather(-1, labels[..., None]).mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    attention, cosine = [], []
    for layer, o_s, o_t in zip(student.decoder.layers, ours, teacher, strict=True):
        if not isinstance(layer.self_attention, KSASelfAttention):
            continue
        o_s = o_s[:LENGTH]
        if config.normalize:
            o_s, o_t = (o / (o.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6) for o in (o_s, o_t))
        attention.append(torch.clamp((o_s - o_t) ** 2, 0, config.clamp).mean())
        cosine.append((1 - torch.cosine_similarity(o_s, o_t, dim=-1)).mean())
    return ce, kl, torch.stack(attention).mean(), torch.stack(cosine).mean()


def dense_twin(student, dtype=torch.float64):
    """The dense model with the student's shared weights."""
    dense = build_model(DENSE, transformer_config()).to(dtype)
    shared = {name: value for name, value in student.state_dict().items() if not is_summary_parameter(name)}
    dense.load_state_dict(shared)
    return dense


@pytest.mark.parametrize("pattern", ["klkf", "kwkf"])
def test_teacher_is_the_dense_model(pattern):
    """In float32: logits from the teacher's hidden states are those of the dense model with the same weights."""
    ksa = dataclasses.replace(KSA, layer_pattern=pattern)
    student = distilled(DistillConfig(enabled=True), ksa, dtype=torch.float32)
    dense, tokens, seen = dense_twin(student, torch.float32), random_tokens(BATCH, LENGTH), {}

    def processor(*, hidden_states, context, output_layer, **_unused):
        seen.update(student=output_layer(hidden_states)[0], teacher=output_layer(context)[0])
        return hidden_states

    student(tokens, None, labels=tokens, output_processor=processor)
    expected = dense(tokens, None)
    assert_close("teacher's logits", seen["teacher"].transpose(0, 1), expected, 1e-5)
    assert (seen["student"].transpose(0, 1) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(enabled=True),
        DistillConfig(enabled=True, ce_weight=0.5, kl_weight=2.0, attention_weight=3.0, cosine_weight=0.7, clamp=0.01),
        DistillConfig(enabled=True, cosine_weight=1.0, normalize=True, clamp=0.5),
        DistillConfig(enabled=True, kl_weight=0.0, attention_weight=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, RECOMPUTE], ids=["stored", "recomputed"])
def test_losses_and_gradients_are_those_of_the_recipe(config, changes):
    student = distilled(config, **changes)
    losses = losses_of(student, config)
    torch.autograd.backward((losses.total.mean(),), grad_tensors=None)
    plain = build_model(KSA, transformer_config()).double()
    plain.load_state_dict(student.state_dict())
    freeze_shared_parameters(plain)
    ce, kl, attention, cosine = expected_losses(config, dense_twin(student), plain)
    total = config.ce_weight * ce + config.kl_weight * kl
    # The losses are kept in float32.
    assert losses.cross_entropy.mean().item() == pytest.approx(ce.item(), rel=1e-6)
    assert losses.divergence.mean().item() == pytest.approx(kl.item(), rel=1e-6)
    assert losses.total.mean().item() == pytest.approx(total.item(), rel=1e-6)
    parts = [term.take() for term in student.distillation.terms]
    if config.compares_attention:
        got = torch.stack(parts).sum(0)
        assert got[0].item() == pytest.approx(attention.item(), rel=1e-6)
        if config.cosine_weight:
            assert got[1].item() == pytest.approx(cosine.item(), rel=1e-6)
    (total + config.attention_weight * attention + config.cosine_weight * cosine).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in student.named_parameters():
        if not is_summary_parameter(name):
            assert parameter.grad is None, name
        elif expected[name].grad is not None:
            # The factor of each token's loss is float32.
            assert_close(name, parameter.grad, expected[name].grad, 1e-6)


def test_clamp_stops_gradients():
    """With every difference beyond it the attention term is the clamp and has no gradient."""
    config = DistillConfig(enabled=True, ce_weight=0.0, kl_weight=0.0, clamp=1e-30)
    student = distilled(config)
    losses_of(student, config).total.mean().backward()
    sums = torch.stack([term.take() for term in student.distillation.terms]).sum(0)
    assert sums[0].item() == pytest.approx(1e-30, rel=1e-6)
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_several_micro_batches_under_recompute_meet_their_own_teachers():
    """Pipelines run forward passes of several micro-batches before the first backward pass."""
    config = DistillConfig(enabled=True)
    gradients = []
    for together in (False, True):
        student = distilled(config, **RECOMPUTE)
        losses = []
        for seed in (0, 7):
            losses.append(losses_of(student, config, seed).total.mean())
            if not together:
                losses[-1].backward()
        for loss in losses if together else ():
            loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
        assert not any(term.teacher for term in student.distillation.terms)
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, 1e-12)


def test_evaluation_keeps_nothing():
    config = DistillConfig(enabled=True)
    student = distilled(config)
    with torch.no_grad():
        evaluated = losses_of(student, config)
    assert not any(term.teacher or term.take() is not None for term in student.distillation.terms)
    assert_close("total", evaluated.total, losses_of(student, config).total.detach(), 1e-12)


def test_logits_of_neither_head_exist_whole():
    from test_chunked_loss import LargestLogits

    config = DistillConfig(enabled=True)
    model = build_model(
        KSA, transformer_config(), vocab_size=LargestLogits.words, share_embeddings_and_output_weights=False
    )
    freeze_shared_parameters(model)
    model.distill(config, KSA.num_summarised(4))
    with LargestLogits() as seen:
        losses_of(model, config).total.sum().backward()
    assert seen.rows == ROWS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teacher_in_host_memory_gives_the_same_gradients():
    """Copies to the host run beside the computation: what comes back is what the teacher's layer gave, bit for bit."""
    gradients, peaks, rows = [], [], 4096
    for offload in (False, True):
        config = DistillConfig(enabled=True, offload=offload)
        student = distilled(config, dtype=torch.bfloat16, **RECOMPUTE).cuda()
        tokens = random_tokens(BATCH, rows).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            loss = DistillationLoss(LossConfig(ROWS * 100), config)
            TokenLosses(*student(tokens, None, labels=tokens, output_processor=loss)).total.mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
    # One of two KSA layers' outputs, [rows, batch, 32] in bf16, is not on the GPU at the peak.
    assert peaks[0] - peaks[1] >= rows * BATCH * 32 * 2 // 2, peaks
