"""Norm against torch's modules and the formulas: values, gradients, zero-centred weights, sequence parallelism."""

import pytest
import torch
from compare import assert_close
from single_process import transformer_config

from megatron_ksa.errors import UsageError
from megatron_ksa.model.norm import Norm

SIZE, EPS = 24, 1e-3
TORCH = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def build(normalization, **changes):
    return Norm(transformer_config(normalization=normalization, **changes), SIZE, EPS)


def rows(dtype=torch.float32):
    """[5, 3, SIZE] with a mean, and a scale at which eps matters."""
    x = 0.05 * torch.randn(5, 3, SIZE, generator=torch.Generator().manual_seed(0)) + 0.02
    return x.to(dtype).requires_grad_()


def randomize(norm):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def output_gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)


def results(norm, x):
    """Output, and gradients of x and of the parameters by name."""
    out = norm(x)
    out.backward(output_gradient(out))
    return {"out": out, "x": x.grad} | {name: parameter.grad for name, parameter in norm.named_parameters()}


def exact(normalization, x, weight, bias=0.0):
    """The formula, in float64."""
    x = x.double()
    if normalization == "RMSNorm":
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("normalization", TORCH)
def test_equals_torch(normalization):
    ours, torchs = randomize(build(normalization)), TORCH[normalization](SIZE, EPS)
    torchs.load_state_dict(ours.state_dict())
    expected = results(torchs, rows())
    for name, value in results(ours, rows()).items():
        assert torch.equal(value, expected.pop(name)), name
    assert not expected


@pytest.mark.parametrize("normalization", TORCH)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params_dtype", [torch.float32, "the rows'"])
def test_equals_the_formula(normalization, zero_centered, dtype, params_dtype):
    params_dtype = dtype if params_dtype == "the rows'" else params_dtype
    changes = {"layernorm_zero_centered_gamma": zero_centered, "params_dtype": params_dtype}
    norm, x = randomize(build(normalization, **changes)), rows(dtype)
    leaves = {"x": x, **dict(norm.named_parameters())}
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    reference = exact(normalization, leaves["x"], leaves["weight"] + zero_centered, leaves.get("bias", 0.0))
    got = results(norm, x)
    reference.backward(output_gradient(got["out"]).double())
    assert got["out"].dtype == dtype
    assert_close("out", got["out"], reference)
    for name, leaf in leaves.items():
        assert_close(name, got[name], leaf.grad)


@pytest.mark.parametrize("normalization", TORCH)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_starts_as_plain_normalisation(normalization, zero_centered):
    norm = build(normalization, layernorm_zero_centered_gamma=zero_centered)
    assert torch.equal(norm.weight, torch.full((SIZE,), 0.0 if zero_centered else 1.0))
    assert torch.equal(norm(rows()), TORCH[normalization](SIZE, EPS)(rows()))


def test_zero_centred_weight_keeps_its_low_bits():
    """1 + g in bfloat16 would round a weight of 2^-10 away."""
    norm = build("RMSNorm", layernorm_zero_centered_gamma=True, params_dtype=torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 2.0**-10)
    weight = norm.weight.detach().double() + 1
    x = rows(torch.bfloat16)
    assert torch.equal(norm(x), exact("RMSNorm", x.float(), weight).to(torch.bfloat16))
    torch.nn.init.zeros_(norm.weight)
    assert not torch.equal(norm(x), exact("RMSNorm", x.float(), weight).to(torch.bfloat16))


@pytest.mark.parametrize("normalization", TORCH)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_carries_sequence_parallel(normalization, sequence_parallel):
    """Megatron sums the gradients of exactly these parameters over the tensor-parallel group."""
    changes = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if sequence_parallel else {}
    norm = build(normalization, **changes)
    assert {name: p.sequence_parallel for name, p in norm.named_parameters()} == dict.fromkeys(
        ["weight"] if normalization == "RMSNorm" else ["weight", "bias"], sequence_parallel
    )


def test_unknown_normalisation_names_the_flag():
    config = transformer_config()
    config.normalization = "L2Norm"
    with pytest.raises(UsageError, match="'L2Norm'.*--normalization"):
        Norm(config, SIZE)
