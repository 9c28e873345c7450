"""Annealing beside CUDA graphs: the coefficient is a tensor that graphs read, set between iterations."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from single_process import build_model, random_tokens

from megatron_ksa import KSAConfig
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.model.attention import KSASelfAttention, blend
from megatron_ksa.training.annealing import annealed, is_annealed_in_graphs
from megatron_ksa.training.configure import trainer_patches
from megatron_ksa.upstream.trainer import TRAIN_STEP

ANNEALED = KSAConfig(enabled=True, layer_pattern="kklf", window_chunks="2", anneal_start=2, anneal_end=6)


def losses(model):
    tokens = random_tokens(2, 64)
    return model(tokens, torch.arange(64).expand(2, -1), labels=tokens)


def coefficients(model):
    return {
        id(m.summary_coefficient): m.summary_coefficient for m in model.modules() if isinstance(m, KSASelfAttention)
    }


@pytest.mark.parametrize("a", [1.0, 0.5, 0.0])
def test_a_coefficient_on_the_device_gives_the_same_losses_and_gradients(a):
    model = build_model(ANNEALED)
    found = []
    for graphs in ("none", "full_iteration"):
        model.config.cuda_graph_impl = graphs
        model.set_summary_coefficient(a)
        model.zero_grad()
        loss = losses(model)
        loss.mean().backward()
        found.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, grads), (read, others) = found
    torch.testing.assert_close(plain, read)
    for name, gradient in others.items():
        expected = grads.get(name)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected, msg=name)


def test_graphs_keep_the_tensor_and_see_the_next_value():
    """A graph repeated the coefficient of the iteration that it captured."""
    model = build_model(ANNEALED)
    model.config.cuda_graph_impl = "local"
    args = argparse.Namespace(cuda_graph_impl="local", curr_iteration=2)
    assert is_annealed_in_graphs(args, ANNEALED) and not is_annealed_in_graphs(args, KSAConfig(enabled=True))
    seen = []

    def train_step(forward_step, data, model, *rest):
        (value,) = coefficients(model[0]).values()
        seen.append((id(value), value.item()))

    step = annealed(train_step, args, ANNEALED)
    for args.curr_iteration in (2, 4, 9):
        step(None, None, [model])
    assert [value for _, value in seen] == [1.0, 0.5, 0.0] and len({key for key, _ in seen}) == 1


def test_the_schedule_without_graphs_stays_a_number():
    model = build_model(ANNEALED)
    model.set_summary_coefficient(0.5)
    assert list(coefficients(model).values()) == [0.5]


def test_a_blend_is_rounded_once():
    """Both products were rounded to 16 bits before their sum."""
    shared, own = (torch.randn(1000, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    exact = (0.3 * own.double() + 0.7 * shared.double()).bfloat16()
    assert (blend(shared, own, 0.3) == exact).float().mean() > 0.99
    for a in (1.0, 0.9, 0.5, 0.3, 0.1, 0.0):
        # To the bit: a graph trains to the numbers of a run without.
        assert torch.equal(blend(shared, own, a), blend(shared, own, torch.tensor(a)))
    assert torch.equal(blend(shared, own, torch.tensor(1.0)), own)
    assert torch.equal(blend(shared, own, torch.tensor(0.0)), shared)


@pytest.mark.parametrize(("graphs", "ksa", "patched"), [
    ("full_iteration", ANNEALED, True), ("none", ANNEALED, False),
    ("full_iteration", KSAConfig(enabled=True, layer_pattern="kklf"), False),
])  # fmt: skip
def test_the_trainer_sets_the_coefficient_between_iterations(graphs, ksa, patched):
    """A forward step, which set it, does not come by where an iteration is a graph's."""
    args = argparse.Namespace(
        cuda_graph_impl=graphs, curr_iteration=3, async_save=False, padded_vocab_size=64,
        check_for_nan_in_loss_and_grad=False, fp8=None,
    )  # fmt: skip
    settings = RunSettings(ksa, None)
    patches = trainer_patches(args, settings, SimpleNamespace(is_needed=False))
    assert any(patch.target == TRAIN_STEP.target for patch in patches) == patched
