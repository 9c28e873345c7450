"""Distributed optimizer with torch's Adam: state that is saved and loaded in memory, without the trainer."""

import io

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from single_process import build_model, process_groups, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.upstream import distributed_optimizer
from megatron_ksa.upstream.patches import apply

KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="k")


@pytest.fixture
def resume_fix(monkeypatch):
    """The fix for the length of one test."""
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    assert distributed_optimizer.patches()
    with apply(distributed_optimizer.patches()):
        yield


class Run:
    """A model of one layer, its distributed optimizer, and training steps on fixed data."""

    def __init__(self, seed, bf16=False):
        groups = process_groups()
        config = transformer_config(num_layers=1, bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32)
        model = build_model(KSA, config, seed=seed)
        self.model = DistributedDataParallel(
            config, DistributedDataParallelConfig(use_distributed_optimizer=True), model.bfloat16() if bf16 else model
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, weight_decay=0.0, bf16=bf16, use_distributed_optimizer=True,
                params_dtype=config.params_dtype,
            ),
            [self.model],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )  # fmt: skip
        # One chained optimizer holds them all.
        (self.distributed,) = self.optimizer.chained_optimizers

    def train(self, steps):
        for step in steps:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            tokens, labels = random_tokens(1, 16, seed=step), random_tokens(1, 16, seed=step + 100)
            self.model(tokens, None, labels=labels).float().mean().backward()
            self.model.finish_grad_sync()
            self.optimizer.step()
        return self

    def save(self):
        optimizer = self.distributed.state_dict()
        tensors = self.distributed.get_parameter_state_dp_reshardable()
        for bucket in (bucket for buckets in tensors[0].values() for bucket in buckets):
            for entry in bucket:
                # Checkpoints pad buckets for other numbers of ranks.
                entry["padding"] = False
        file = io.BytesIO()
        torch.save((optimizer, tensors, self.model.state_dict()), file)
        return file

    def load(self, saved):
        saved.seek(0)
        optimizer, tensors, model = torch.load(saved, weights_only=False)
        self.model.load_state_dict(model)
        sharding = {"param_state": tensors, "param_state_sharding_type": "dp_reshardable"}
        self.distributed.load_state_dict(optimizer | sharding)
        return self

    def steps(self):
        return [state["step"] for state in self.distributed.optimizer.state.values()]


def assert_same_weights(actual, expected):
    for (name, value), wanted in zip(actual.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_equals_uninterrupted(resume_fix, bf16):
    """Also from other weights, which the checkpoint replaces."""
    whole = Run(0, bf16).train(range(4))
    saved = Run(0, bf16).train(range(2)).save()
    resumed = Run(1, bf16).load(saved).train(range(2, 4))
    assert {step.item() for step in resumed.steps()} == {4.0}
    assert_same_weights(resumed, whole)


def test_each_parameter_has_a_step_of_its_own(resume_fix):
    """One shared step was advanced once for each parameter, and the bias correction went wrong unnoticed."""
    resumed = Run(0).load(Run(0).train(range(2)).save())
    steps = resumed.steps()
    assert len({step.data_ptr() for step in steps}) == len(steps) > 1


def test_state_before_the_first_step_can_be_saved_and_loaded(resume_fix):
    """Reading the steps of an optimizer that had none failed."""
    resumed = Run(1).load(Run(0).save())
    assert {step.item() for step in resumed.steps()} == {0.0}
    assert_same_weights(resumed.train(range(2)), Run(0).train(range(2)))


def test_fix_leaves_fused_adams_alone(monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    assert distributed_optimizer.patches() == ()
