"""Layers of Transformer Engine, whose package needs a GPU: a stand-in for its fused norm and projection runs here."""

import contextlib
import copy
import types

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import random as megatrons_random
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa import KSAConfig
from megatron_ksa.checkpoint.norm_names import ask_for_stored_names, other_name
from megatron_ksa.model import layer_specs, norm
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.layers import SplitLayerNorm
from megatron_ksa.model.norm import Norm, ResidualNorm
from megatron_ksa.model.summary_parameters import copy_shared_parameters, is_summary_parameter


class NormLinear(ColumnParallelLinear):
    """What Transformer Engine's LayerNormLinear has: parameters `layer_norm_*` of its own, before the weight."""

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        # Transformer Engine registers it first.
        own = self._parameters
        self._parameters = {"layer_norm_weight": torch.nn.Parameter(torch.ones(input_size))} | own

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
def layers(monkeypatch):
    """Builds models of Transformer Engine's layers, with norms in the products' modules or beside them (`beside`)."""

    def build(ksa, beside=False, changes=None, **options):
        with monkeypatch.context() as patch:
            patch.setattr(layer_specs, "_backend", lambda config: FusedProvider())
            patch.setattr(gpt_layer_specs, "TESpecProvider", FusedProvider)
            # The tiny model's rows are none that the kernel of norms takes.
            patch.setattr(norm, "FUSED_SIZES", range(1, 4096) if beside else range(0))
            config = transformer_config()
            config.transformer_impl = "transformer_engine"
            for name, value in (changes or {}).items():
                setattr(config, name, value)
            return build_model(ksa, config, **options)

    return build


@pytest.fixture
def fused(layers):
    """Builds models whose norms are in the products' modules."""
    return layers


def renamed(state):
    """A local model's parameters under the names of the fused ones."""
    return {other_name(name) or name: value for name, value in state.items()}


KINDS = [{}, {"independent_projections": False}, {"independent_layernorm": True}, {"independent_qk_norm": True}]


@pytest.mark.parametrize("settings", KINDS, ids=lambda kind: "".join(kind) or "default")
@pytest.mark.parametrize("a", [1.0, 0.25])
@pytest.mark.parametrize("beside", [False, True], ids=["fused", "beside"])
def test_layers_are_the_local_ones(layers, settings, a, beside):
    """Losses and every gradient, the shared norm's too, which text and summary rows both add to."""
    ksa = KSAConfig(enabled=True, layer_pattern="kklf", window_chunks="2", **settings)
    tokens, losses, gradients = random_tokens(2, 64), [], []
    local = build_model(ksa)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    other = layers(ksa, beside)
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
        assert isinstance(layer.input_layernorm, IdentityOp) and isinstance(layer.pre_mlp_layernorm, IdentityOp)
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


@pytest.mark.parametrize("settings", KINDS, ids=lambda kind: "".join(kind) or "default")
def test_norms_beside_products_leave_parameters_where_they_were(layers, settings):
    """Names and their order, by which distributed optimizers store state, are those of the fused modules of FP8."""
    ksa = KSAConfig(enabled=True, layer_pattern="kklf", **settings)
    models = layers(ksa), layers(ksa, beside=True)
    assert len({tuple(name for name, _ in model.named_parameters()) for model in models}) == 1
    assert len({tuple(model.state_dict()) for model in models}) == 1
    keys = [[getattr(value, "key", None) for value in model.sharded_state_dict().values()] for model in models]
    assert keys[0] == keys[1]
    own, other = ([(p.shape, p.dtype, p.requires_grad) for p in model.parameters()] for model in models)
    assert own == other
    for layer in models[1].decoder.layers:
        assert isinstance(layer.pre_mlp_layernorm, ResidualNorm) and not [*layer.pre_mlp_layernorm.parameters()]
        splits = isinstance(layer.input_layernorm, SplitLayerNorm)
        assert splits == (ksa.independent_layernorm and isinstance(layer.self_attention, KSASelfAttention))
        assert splits or isinstance(layer.input_layernorm, ResidualNorm)


@pytest.mark.parametrize(
    "changes",
    [{"fp8": "hybrid", "fp8_recipe": "delayed"}, {"fp4": "e2m1"}, {"tp_comm_overlap": True}, {"quant_recipe": object()},
     {"normalization": "LayerNorm"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_norms_stay_in_the_products_module(layers, changes):
    """Where it writes 8-bit numbers or overlaps communication, and where this project has no kernel."""
    config = transformer_config()
    config.transformer_impl = "transformer_engine"
    for name, value in changes.items():
        setattr(config, name, value)
    assert not layer_specs._runs_norm_apart(config)


def test_a_layer_asks_for_its_norms_parameter_by_a_call(layers):
    """Hooks of the projection wait for gathered parameters, and sharded data parallelism replaces them."""
    model = layers(KSAConfig(enabled=True, layer_pattern="kkkf"), beside=True)
    linear = model.decoder.layers[0].mlp.linear_fc1
    order = []
    linear.register_forward_pre_hook(lambda module, args: order.append("norm" if args[0] is None else "rows"))
    linear.layer_norm_weight = torch.nn.Parameter(torch.full((32,), 2.0))
    model(random_tokens(1, 64), torch.arange(64)[None])
    assert order == ["norm", "rows"]
    assert model.decoder.layers[0].pre_mlp_layernorm.weight is linear.layer_norm_weight


def test_recomputed_norms_beside_products_give_the_same_gradients(layers, monkeypatch):
    """`--recompute-modules layernorm` finds them, and the gradient of the parameter that another module holds."""
    state = types.SimpleNamespace(
        is_fp8_enabled=lambda: False, is_fp8_calibration=lambda: False, get_fp8_recipe=lambda: None,
        get_fp8_group=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(megatrons_random, "FP8GlobalStateManager", state, raising=False)
    for name in ("activation_recompute_forward", "fp8_autocast"):
        monkeypatch.setattr(megatrons_random, name, lambda **_: contextlib.nullcontext(), raising=False)
    ksa, tokens = KSAConfig(enabled=True, layer_pattern="kklf", window_chunks="2"), random_tokens(2, 64)
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    gradients = []
    for changes in ({}, recomputed):
        model = layers(ksa, beside=True, changes=changes)
        assert model.decoder.layers[0].recompute_pre_mlp_layernorm == bool(changes)
        model(tokens, torch.arange(64).expand(2, -1), labels=tokens).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
