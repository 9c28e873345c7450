"""Clipping, Adam and the 16-bit copy in one pass: Megatron's numbers and state, with both of its optimizers."""

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


def train(distributed, bf16, clip, apart, steps=4, decoupled=True):
    """Gradient norms, and parameters and Adam's state after some steps."""
    dispatch.take_apart({"optimizer"} if apart else ())
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
        one_pass_optimizer.take_over(part)
    norms = []
    for step in range(steps):
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
        scaled = 0 < clip < norms[-1] and (apart or step == 0)
        assert unchanged != scaled, "one pass leaves gradients as they are"
    adam = optimizer.chained_optimizers[0].optimizer
    state = [value for group in adam.param_groups for p in group["params"] for value in (p, *adam.state[p].values())]
    return norms, [parameter.detach().float() for parameter in model.parameters()], [t.detach().float() for t in state]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize("decoupled", [True, False])
def test_steps_are_megatrons(distributed, clip, decoupled):
    apart = train(distributed, True, clip, True, decoupled=decoupled)
    together = train(distributed, True, clip, False, decoupled=decoupled)
    for expected, actual in zip(apart, together, strict=True):
        # Clipping's coefficient is formed in float32, not in Python's numbers: 1e-7 of it.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_float32_parameters_of_the_distributed_optimizer():
    """They have no 16-bit copy; their shards are views of the parameters."""
    expected, actual = (train(True, False, 0.05, apart) for apart in (True, False))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_a_step_without_clipping_reads_no_scale():
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
