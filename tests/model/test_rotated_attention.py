"""The rotation kernel in the layers: losses and gradients are those of the angles' path."""

import dataclasses

import pytest
import torch
from compare import assert_close
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.inference.state import DecodingState
from megatron_ksa.kernels import dispatch
from megatron_ksa.kernels.rotation import OP as ROTATION
from megatron_ksa.model import gpt

HYBRID = KSAConfig(enabled=True, chunk_size=4, window_chunks="[1]*4", layer_pattern="kklf")
HARPE = {"bases": (1e4, 5e5)}


@pytest.fixture
def take_kernel(monkeypatch):
    """Sends rotations to the Triton kernel (interpreted without a GPU), or back; counts them."""
    from megatron_ksa.kernels.rotation import triton_rotation

    calls, rotate = [], triton_rotation.rotate
    monkeypatch.setattr(triton_rotation, "rotate", lambda *args, **kw: (calls.append(args), rotate(*args, **kw))[1])

    def choose(taken=True):
        for module in (gpt, dispatch):
            monkeypatch.setattr(module, "uses_triton", lambda op, rows: taken and op == ROTATION)
        return calls

    return choose


def loss_and_gradients(model, position_ids=None):
    tokens, labels = random_tokens(1, 22), random_tokens(1, 22, seed=1)
    loss = model(tokens, position_ids, labels=labels)
    loss.sum().backward()
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "ksa, config, options, a",
    [
        ({}, {}, HARPE, 1.0),
        ({"independent_qk_norm": True}, {"layernorm_zero_centered_gamma": True}, {}, 0.3),
        ({"independent_projections": False}, {"qk_layernorm": False, "rotary_interleaved": True}, HARPE, 1.0),
        ({}, {"normalization": "LayerNorm"}, {"rotary_percent": 0.5}, 1.0),
        ({"enabled": False}, {}, {"rope_scaling": True, "seq_len_interpolation_factor": 2.0}, 1.0),
    ],
    ids="harpe blend-zero-centered shared-interleaved layernorm-partial dense-scaled".split(),
)
def test_losses_and_gradients_are_those_of_the_angles(take_kernel, ksa, config, options, a):
    results = []
    for taken in (False, True):
        calls = take_kernel(taken)
        model = build_model(dataclasses.replace(HYBRID, **ksa), transformer_config(**config), **options).train()
        model.set_summary_coefficient(a)
        results.append(loss_and_gradients(model))
        assert len(calls) == (4 if taken else 0)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected)


def test_recompute_and_packed_documents(take_kernel):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    results = []
    for taken, config in ((False, {}), (True, {}), (True, full)):
        take_kernel(taken)
        model = build_model(HYBRID, transformer_config(**config), reset_documents=True, **HARPE).train()
        results.append(loss_and_gradients(model, positions))
    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected)
        assert torch.equal(results[1][name], results[2][name]), name


def test_decoding_goes_on_at_its_position(take_kernel):
    take_kernel()
    model, tokens = build_model(HYBRID, **HARPE).eval(), random_tokens(1, 22)
    with torch.no_grad():
        expected = model(tokens, None)
    with DecodingState(model, max_batch=1, max_length=22) as state:
        slot = state.join()
        for part in tokens[0].split([13, 1, 8]):
            logits = state.prefill(slot, part)
            assert_close("logits", logits, expected[0, state.lengths[slot] - 1])


def test_reference_can_be_forced():
    class OnCuda:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    try:
        assert dispatch.uses_triton("an op", OnCuda)
        dispatch.force_reference()
        assert not dispatch.uses_triton("an op", OnCuda)
    finally:
        dispatch.force_reference(False)
