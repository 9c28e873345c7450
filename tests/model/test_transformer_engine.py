"""Layers of Transformer Engine, whose package needs a GPU: a stand-in for its fused norm and projection runs here."""

import copy

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa import KSAConfig
from megatron_ksa.checkpoint.norm_names import ask_for_stored_names
from megatron_ksa.model import layer_specs
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.norm import Norm
from megatron_ksa.model.summary_parameters import copy_shared_parameters, is_summary_parameter


class NormLinear(ColumnParallelLinear):
    """What Transformer Engine's LayerNormLinear has: parameters `layer_norm_*` of its own, before the weight."""

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    def forward(self, rows):
        normed = torch.nn.functional.rms_norm(
            rows, rows.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
        )
        return super().forward(normed)


class FusedProvider(LocalSpecProvider):
    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return NormLinear


@pytest.fixture
def fused(monkeypatch):
    """Builds models whose layers have a fused input norm, as those of Transformer Engine."""

    def build(ksa, **options):
        with monkeypatch.context() as patch:
            patch.setattr(layer_specs, "_backend", lambda config: FusedProvider())
            return build_model(ksa, transformer_config(), **options)

    return build


def renamed(state):
    """A local model's parameters under the names of the fused ones."""
    return {name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_"): v for name, v in state.items()}


KINDS = [{}, {"independent_projections": False}, {"independent_layernorm": True}, {"independent_qk_norm": True}]


@pytest.mark.parametrize("settings", KINDS, ids=lambda kind: "".join(kind) or "default")
@pytest.mark.parametrize("a", [1.0, 0.25])
def test_fused_layers_are_the_local_ones(fused, settings, a):
    """Losses and every gradient, the shared norm's too, which text and summary rows both add to."""
    ksa = KSAConfig(enabled=True, layer_pattern="kklf", window_chunks="2", **settings)
    tokens, losses, gradients = random_tokens(2, 64), [], []
    local = build_model(ksa)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    other = fused(ksa)
    names = renamed(local.state_dict())
    if ksa.independent_layernorm:
        # Two norms before one projection: they stand apart in the layers that have both.
        names = {name: value for name, value in {**local.state_dict(), **names}.items() if name in other.state_dict()}
    other.load_state_dict(names)
    for model in (local, other):
        model.set_summary_coefficient(a)
        loss = model(tokens, torch.arange(64).expand(2, -1), labels=tokens).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    expected = {**gradients[0], **renamed(gradients[0])}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_shared_norm_is_one_parameter(fused):
    """Optimizer, checkpoints and data parallelism would have had a second one, never the same after a step."""
    model = fused(KSAConfig(enabled=True, layer_pattern="kkkf"))
    attention = model.decoder.layers[0].self_attention
    assert attention.linear_qkv_summary.layer_norm_weight is attention.linear_qkv.layer_norm_weight
    names = [name for name, _ in model.named_parameters()]
    assert not any("summary.layer_norm" in name for name in names)
    assert not any("summary.layer_norm" in name for name in model.state_dict())
    assert not is_summary_parameter("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
    # Sharded data parallelism replaces parameters.
    attention.linear_qkv.layer_norm_weight = torch.nn.Parameter(torch.full((32,), 2.0))
    model(random_tokens(1, 64), torch.arange(64)[None])
    assert attention.linear_qkv_summary.layer_norm_weight is attention.linear_qkv.layer_norm_weight
    # A moved model still has one.
    moved = model.to(torch.float64).decoder.layers[0].self_attention
    assert moved.linear_qkv_summary.layer_norm_weight.dtype == torch.float64


def test_norms_stand_where_their_kernels_are(fused):
    """Heads were normalised by Transformer Engine's module, apart from the rotation: reads and writes of all heads."""
    model = fused(KSAConfig(enabled=True, layer_pattern="kklf", independent_qk_norm=True))
    for layer in model.decoder.layers:
        assert isinstance(layer.input_layernorm, IdentityOp)
        assert isinstance(layer.self_attention.q_layernorm, Norm) and isinstance(layer.self_attention.k_layernorm, Norm)
        if isinstance(layer.self_attention, KSASelfAttention):
            assert isinstance(layer.self_attention.q_layernorm_summary, Norm)
    assert isinstance(model.decoder.final_layernorm, Norm)


@pytest.mark.parametrize("independent_norm", [False, True])
def test_checkpoints_have_one_set_of_names(fused, independent_norm):
    """The names that local layers write are those that fused ones ask for, and the other way round."""
    ksa = KSAConfig(enabled=True, layer_pattern="kklf", independent_layernorm=independent_norm)
    states = [build(ksa).sharded_state_dict() for build in (build_model, fused)]
    keys = [{value.key for value in state.values() if hasattr(value, "key")} for state in states]
    assert keys[0] == keys[1]
    asked = ask_for_stored_names(states[1], keys[0])
    assert {value.key for value in asked.values() if hasattr(value, "key")} == keys[0]


def test_summary_projections_start_as_the_shared_ones(fused):
    model = fused(KSAConfig(enabled=True, layer_pattern="kkkf"))
    before = copy.deepcopy(model.state_dict())
    copy_shared_parameters(model)
    after = model.state_dict()
    prefix = "decoder.layers.0.self_attention."
    assert torch.equal(after[f"{prefix}linear_qkv_summary.weight"], before[f"{prefix}linear_qkv.weight"])
    assert not torch.equal(before[f"{prefix}linear_qkv_summary.weight"], before[f"{prefix}linear_qkv.weight"])
