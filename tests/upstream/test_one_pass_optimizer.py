"""Clipping, Adam and the 16-bit copy in one pass: Megatron's numbers and state, with both of its optimizers."""

import copy

import fused_adam
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from single_process import build_model, process_groups, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.kernels import dispatch
from megatron_ksa.upstream import one_pass_optimizer
from megatron_ksa.upstream.patches import apply

KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="k")


@pytest.fixture(autouse=True)
def one_pass():
    """The replacements for the length of one test, where the trainer has not put them in place in this process."""
    lasting = clip_grads.multi_tensor_scale_tensor_impl is one_pass_optimizer.scale_tensor
    with apply([] if lasting else one_pass_optimizer.PATCHES):
        yield
    dispatch.take_apart(())


@pytest.fixture(params=["torch's Adam", "FusedAdam"])
def adam(request, monkeypatch):
    """The Adam that Megatron takes: torch's, or that of Transformer Engine."""
    if request.param == "FusedAdam":
        fused_adam.install(monkeypatch)
    return request.param


def build(distributed, bf16, clip, decoupled=True, kind=None, take=True):
    """A model and Megatron's optimizer of it, taken over; of a kind of FusedAdam by its attributes or settings."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = transformer_config(num_layers=1, bf16=bf16, params_dtype=dtype)
    model = build_model(KSA, config, seed=0)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, model.to(dtype))
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, bf16=bf16, use_distributed_optimizer=distributed, clip_grad=clip,
        params_dtype=dtype, decoupled_weight_decay=decoupled,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(
        settings, [model], use_gloo_process_groups=False, pg_collection=process_groups()
    )  # fmt: skip
    for part in optimizer.chained_optimizers:
        for name, value in (kind or {}).items():
            assert hasattr(part.optimizer, name) or name in part.optimizer.param_groups[0]
            setattr(part.optimizer, name, value)
            for group in part.optimizer.param_groups:
                group.update({name: value} if name in group else {})
        if take:
            one_pass_optimizer.take_over(part)
    return model, optimizer


def train(distributed, bf16, clip, apart, decoupled=True):
    """Gradient norms, and parameters and Adam's state after some steps."""
    model, optimizer = build(distributed, bf16, clip, decoupled)
    dispatch.take_apart({"optimizer"} if apart else ())
    norms = take_steps(model, optimizer, clip, range(4), together=() if apart else range(1, 4))
    adam = optimizer.chained_optimizers[0].optimizer
    if isinstance(adam, fused_adam.FusedAdam):
        assert adam.own_steps == (4 if apart else 1)
    return norms, *contents(model, adam)


def contents(model, adam):
    """Parameters of the model, and those of its Adam with their state and the counts of groups."""
    state = [value for group in adam.param_groups for p in group["params"] for value in (p, *adam.state[p].values())]
    counts = [torch.tensor(group["step"]) for group in adam.param_groups if "step" in group]
    parameters = [parameter.detach().float().clone() for parameter in model.parameters()]
    return parameters, [t.detach().float().clone() for t in [*state, *counts]]


def take_steps(model, optimizer, clip, steps, together):
    """Gradient norms of these steps, of which those in `together` are one pass."""
    norms = []
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        tokens, labels = random_tokens(1, 16, seed=step), random_tokens(1, 16, seed=step + 100)
        model(tokens, None, labels=labels).float().mean().backward()
        model.finish_grad_sync()
        gradients = [parameter.main_grad.clone() for parameter in model.parameters()]
        successful, norm, _ = optimizer.step()
        assert successful
        norms.append(float(norm))
        wanted = torch.cat([gradient.flatten().double() for gradient in gradients]).norm()
        assert norms[-1] == pytest.approx(float(wanted), rel=1e-5)
        unchanged = all(torch.equal(a, b.main_grad) for a, b in zip(gradients, model.parameters(), strict=True))
        scaled = 0 < clip < norms[-1] and step not in together
        assert unchanged != scaled, "one pass leaves gradients as they are"
    return norms


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize("decoupled", [True, False])
def test_steps_are_megatrons(adam, distributed, clip, decoupled):
    apart = train(distributed, True, clip, True, decoupled=decoupled)
    together = train(distributed, True, clip, False, decoupled=decoupled)
    for expected, actual in zip(apart, together, strict=True):
        # Clipping's coefficient is formed in float32, not in Python's numbers: 1e-7 of it.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_float32_parameters_of_the_distributed_optimizer(adam):
    """They have no 16-bit copy; their shards are views of the parameters."""
    expected, actual = (train(True, False, 0.05, apart) for apart in (True, False))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_a_step_without_clipping_reads_no_scale(adam):
    expected, actual = (train(False, True, 0.0, apart, decoupled=True) for apart in (True, False))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


def test_optimizers_that_it_does_not_know_are_left_alone():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 4.0)
    one_pass_optimizer.take_over(torch.optim.SGD([parameter], lr=1.0))
    gradients = [parameter.grad]
    one_pass_optimizer.scale_tensor(0, None, [gradients, gradients], torch.tensor([0.25]))
    assert torch.equal(parameter.grad, torch.ones(2))


def test_a_resumed_run_of_fused_adam_goes_on_as_the_uninterrupted_one(monkeypatch):
    """Its steps are counted in a number of each group, from which the next one pass counts on."""
    fused_adam.install(monkeypatch)
    model, optimizer = build(False, True, 0.05)
    take_steps(model, optimizer, 0.05, range(2), together=[1])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    groups = saved[1]["optimizer"]["param_groups"]
    assert len(groups) == 2 and all(type(group["step"]) is int and group["step"] == 2 for group in groups)
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in saved[1]["optimizer"]["state"].values())
    take_steps(model, optimizer, 0.05, range(2, 4), together=[2, 3])
    other, resumed = build(False, True, 0.05)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    take_steps(other, resumed, 0.05, range(2, 4), together=[2, 3])
    # The state was there: no step was FusedAdam's own.
    assert resumed.chained_optimizers[0].optimizer.own_steps == 0
    uninterrupted = contents(model, optimizer.chained_optimizers[0].optimizer)
    continued = contents(other, resumed.chained_optimizers[0].optimizer)
    torch.testing.assert_close(continued, uninterrupted, rtol=0, atol=0)


OF_ANOTHER_KIND = (
    {"capturable": True}, {"master_weights": True}, {"use_decoupled_grad": True}, {"store_param_remainders": True},
    {"exp_avg_dtype": torch.bfloat16}, {"exp_avg_sq_dtype": torch.float16}, {"bias_correction": False},
)  # fmt: skip


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND, ids=lambda kind: next(iter(kind)))
def test_fused_adams_of_another_kind_step_themselves(monkeypatch, kind):
    """Their state or gradients are not what the kernel takes."""
    fused_adam.install(monkeypatch)
    model, optimizer = build(False, True, 0.05, kind=kind)
    take_steps(model, optimizer, 0.05, range(2), together=())
    assert optimizer.chained_optimizers[0].optimizer.own_steps == 2


def test_parameters_in_eight_bits_are_left_alone(monkeypatch):
    """They are tensors of a class of their own, which only the optimizer's owner writes."""

    class Quantized(torch.nn.Parameter):
        pass

    fused_adam.install(monkeypatch)
    model, optimizer = build(False, True, 0.05, take=False)
    part = optimizer.chained_optimizers[0]
    part.float16_groups[0][0].__class__ = Quantized
    one_pass_optimizer.take_over(part)
    take_steps(model, optimizer, 0.05, range(2), together=())
    assert part.optimizer.own_steps == 2
