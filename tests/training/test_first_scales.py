"""Scales of FP8's delayed recipe before the first step, with a stand-in for Transformer Engine's products."""

import argparse
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from single_process import process_groups
from torch import nn

from megatron_ksa import KSAConfig
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.training import first_scales
from megatron_ksa.training.configure import trainer_patches
from megatron_ksa.training.first_scales import FirstScales
from megatron_ksa.upstream import dropped_passes
from megatron_ksa.upstream.trainer import TRAIN_STEP

WIDTH, LAYERS, TOKENS, MICRO_BATCHES = 32, 6, 64, 2
ARGS = argparse.Namespace(seq_length=TOKENS, micro_batch_size=1, decoder_seq_length=None, curr_iteration=0)
SAID = "FP8, delayed: scales come from"


class Scaling:
    """Transformer Engine's `DelayedScalingRecipeState`: fresh scales are 1, the history's first row is written to."""

    def __init__(self, tensors, dtype, history):
        self.dtype, self.limit = dtype, torch.finfo(dtype).max
        self.scale, self.amax_history = torch.ones(tensors), torch.zeros(history, tensors)

    def quantized(self, x, index):
        self.amax_history[0, index] = torch.maximum(self.amax_history[0, index], x.detach().abs().max())
        scale = self.scale[index].clone()
        return (x * scale).clamp(-self.limit, self.limit).to(self.dtype).to(x.dtype) / scale

    def update(self):
        largest = self.amax_history.amax(0)
        self.scale.copy_(torch.where(largest > 0, self.limit / largest, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, metas):
        forward, ctx.backward_state = metas["scaling_fwd"], metas["scaling_bwd"]
        x, weight = forward.quantized(x, 0), forward.quantized(weight, 1)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = ctx.backward_state.quantized(grad, 0)
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), None


class Product(nn.Module):
    """A weight with `fp8_meta` as Transformer Engine's: without scales until it has run or was loaded."""

    def __init__(self, size_in, size_out, history):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size_out, size_in) / size_in**0.5)
        self.history, self.fp8_meta = history, {"num_gemms": 1}

    def forward(self, x):
        if self.history is None:
            return x @ self.weight.T
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["scaling_fwd"] = Scaling(3, torch.float8_e4m3fn, self.history)
            self.fp8_meta["scaling_bwd"] = Scaling(2, torch.float8_e5m2, self.history)
        return _Product.apply(x, self.weight, self.fp8_meta)


class Model(nn.Module):
    """Residual layers of two products each, as MLPs are, with a buffer that forward passes change.

    Attributes:
        history: rows of the largest values' history; None without FP8.
    """

    def __init__(self, history=1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList([Product(WIDTH, 2 * WIDTH, history), Product(2 * WIDTH, WIDTH, history)])
            for _ in range(LAYERS)
        )
        self.embedding, self.head, self.dropout = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16), nn.Dropout(0.1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens):
        self.calls += 1
        x = self.embedding(tokens)
        for first, second in self.layers:
            x = x + second(self.dropout(torch.relu(first(torch.nn.functional.rms_norm(x, (WIDTH,))))))
        logits = self.head(torch.nn.functional.rms_norm(x, (WIDTH,)))
        # As the mean over the tokens of a real batch: gradients are far below E5M2's least value.
        return torch.nn.functional.cross_entropy(logits, tokens.roll(-1)) / 8192

    def zero_grad_buffer(self):
        self.zero_grad()

    def update(self, key):
        for module in self.modules():
            if key in getattr(module, "fp8_meta", {}):
                module.fp8_meta[key].update()

    def norm(self):
        return torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm().item()


class Run:
    """The parts of Megatron's trainer that a first step uses; it records what every pass reads."""

    def __init__(self, model, batches=20):
        self.model, self.log = model, SimpleNamespace(take=lambda iteration: self.taken.append(iteration))
        self.taken, self.read, self.losses = [], [], []
        self.optimizer = SimpleNamespace(zero_grad=lambda: None)
        generator = torch.Generator().manual_seed(0)
        batches = iter(
            [{"tokens": torch.randint(16, (TOKENS,), generator=generator), "number": i} for i in range(batches)]
        )
        self.data = RerunDataIterator(batches)
        self.finder = FirstScales(ARGS, self.log)
        self.step = self.finder.train_step(self._train_step)

    def passes(self, *, forward_step_func, data_iterator, model, num_microbatches, forward_only, **options):
        assert not forward_only and set(options) == {
            "seq_length", "micro_batch_size", "decoder_seq_length", "p2p_communicator", "pg_collection"
        }  # fmt: skip
        numbers = []
        for _ in range(num_microbatches):
            batch = next(data_iterator[0] if isinstance(data_iterator, list) else data_iterator)
            # What a forward step may do with its batch.
            numbers.append(batch.pop("number"))
            loss = forward_step_func(batch, model[0])
            get_rerun_state_machine().validate_result(
                loss, torch.isnan, "found NaN in local forward loss calculation", fatal=True
            )
            model[0].update("scaling_fwd")
            loss.backward()
            model[0].update("scaling_bwd")
            get_moe_metrics_tracker().record("aux", loss.detach(), 1, 1)
            self.losses.append(loss.item())
        self.read.append(numbers)

    def _train_step(
        self, forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, forward_backward_func,
        iteration=None, pg_collection=None, p2p_communicator=None,
    ):  # fmt: skip
        machine = get_rerun_state_machine()
        while machine.should_run_forward_backward(data_iterator):
            model[0].zero_grad_buffer()
            forward_backward_func(
                forward_step_func=forward_step_func, data_iterator=data_iterator, model=model, seq_length=TOKENS,
                num_microbatches=MICRO_BATCHES, micro_batch_size=1, decoder_seq_length=None, forward_only=False,
                p2p_communicator=None, pg_collection=None,
            )  # fmt: skip
        return model[0].norm()

    def __call__(self, data=None, passes=None):
        """A step's gradient norm."""
        data = self.data if data is None else data
        return self.step(
            lambda batch, model: model(batch["tokens"]), data, [self.model], self.optimizer, None, None,
            passes or self.passes, iteration=0,
        )  # fmt: skip


@pytest.fixture
def machine(request):
    """The rerun state machine in the mode of the test's parameter."""
    process_groups()
    init_num_microbatches_calculator(0, None, MICRO_BATCHES, 1, 1)
    initialize_rerun_state_machine(mode=getattr(request, "param", RerunMode.DISABLED))
    yield get_rerun_state_machine()
    destroy_rerun_state_machine()
    destroy_num_microbatches_calculator()
    get_moe_metrics_tracker().metrics.clear()


@pytest.mark.parametrize("history", [1, 16])
def test_the_first_step_has_its_gradients(history, machine, capsys):
    """Scales of 1 turned them to zero: the gradient norm of a 1.9B model's first step was 3.8 in place of 20.8."""
    expected = Run(Model(None))()
    run = Run(Model(history))
    assert run() == pytest.approx(expected, rel=0.02)
    assert f"{SAID} {len(run.read) - 1} passes" in capsys.readouterr().out

    without = Run(Model(history))
    without.finder.looked = True
    # What is left is the embedding's, which no product quantizes.
    assert without() < 0.9 * expected and without.model.layers[0][0].weight.grad.abs().max() == 0


def test_one_pass_is_not_enough(machine, monkeypatch):
    """Why passes are repeated: what becomes zero in an MLP's second product hides the first one's gradients."""
    monkeypatch.setattr(sys.modules[__name__], "MICRO_BATCHES", 1)
    monkeypatch.setattr(first_scales, "get_num_microbatches", lambda: 1)
    expected = Run(Model(None))()
    norms = []
    for most in (1, first_scales.MOST_PASSES):
        monkeypatch.setattr(first_scales, "MOST_PASSES", most)
        norms.append(Run(Model())())
    assert norms[0] < 0.9 * expected and norms[1] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("machine", RerunMode, indirect=True)
def test_every_pass_reads_the_first_batch_and_the_next_step_the_next(machine):
    run = Run(Model())
    rest = run.data.iterable
    run()
    assert len(run.read) > 2 and all(numbers == [0, 1] for numbers in run.read)
    assert run.data.iterable is rest, "the loader has methods that checkpoints call"
    number = len(run.read)
    run()
    # In one of the modes each step runs twice.
    assert run.read[number:] in ([[2, 3]], [[2, 3]] * 2)


@pytest.mark.parametrize("machine", [RerunMode.VALIDATE_RESULTS], indirect=True)
def test_a_step_that_is_run_again_reads_its_own_batch(machine):
    """Megatron rewinds its iterator inside a step; what was read before the step must be in its memory."""
    run = Run(Model())
    asked = []

    def passes(**options):
        run.passes(**options)
        if machine.state.name == "INITIAL_RUN" and not asked:
            asked.append(len(run.read))
            machine.rerun_requested = True
            machine.continue_requested = True

    run(passes=passes)
    assert asked and run.read[asked[0] - 1 :] == [[0, 1], [0, 1]]


def test_lists_of_iterators_and_ranks_without_data(machine):
    run = Run(Model())
    run(data=[run.data, None])
    assert len(run.read) > 2 and all(numbers == [0, 1] for numbers in run.read)
    assert first_scales.repeated(None) == (None, [])


def test_the_step_is_what_it_would_be(machine):
    """Random numbers (dropout), buffers and sums of losses are those of a run without passes."""
    torch.manual_seed(1)
    plain = Run(Model())
    plain.finder.looked = True
    torch.manual_seed(1)
    plain()
    after = torch.rand(3), random.random(), np.random.rand()

    run = Run(Model())
    torch.manual_seed(1)
    get_moe_metrics_tracker().clear()
    seeds = random.getstate(), np.random.get_state()
    run()
    assert run.model.calls == plain.model.calls == MICRO_BATCHES
    torch.testing.assert_close(torch.rand(3), after[0], rtol=0, atol=0)
    assert (random.getstate(), np.random.get_state()[2]) == (seeds[0], seeds[1][2])
    # The losses differ by FP8's rounding alone: the dropped elements are the same.
    assert run.losses[-2:] == pytest.approx(plain.losses, rel=0.02)
    assert get_moe_metrics_tracker().metrics["aux"].values.sum().item() == pytest.approx(sum(run.losses[-2:]))
    assert run.taken == [1], "values that are logged of a step"
    assert "validate_result" not in vars(machine)


def test_random_states_that_graphs_hold_keep_their_objects(machine, monkeypatch):
    """Beside CUDA graphs the tracker's states are generators: a reference to one keeps none of its numbers."""
    generator = torch.Generator().manual_seed(3)
    states = {"model-parallel-rng": generator}
    tracker = SimpleNamespace(get_states=lambda: dict(states), set_states=states.update)
    monkeypatch.setattr(dropped_passes, "get_cuda_rng_tracker", lambda: tracker)
    with dropped_passes.without_trace([Model()]):
        dropped = torch.rand(3, generator=generator)
    assert states["model-parallel-rng"] is generator
    torch.testing.assert_close(torch.rand(3, generator=generator), dropped, rtol=0, atol=0)


def test_passes_are_not_counted_by_a_graph_of_whole_iterations(machine):
    run = Run(Model())
    counted = []

    class Counting(FullCudaGraphWrapper):
        def __init__(self):
            self.forward_backward_func = run.passes

        def __call__(self, **options):
            counted.append(1)
            return run.passes(**options)

    run(passes=Counting())
    assert counted == [1] and len(run.read) > 2


@pytest.fixture
def others(monkeypatch):
    """others(has, lacks): what another rank contributes to each maximum over all ranks."""

    def set_to(*flags):
        def reduced(tensor, operation):
            assert operation == torch.distributed.ReduceOp.MAX
            if len(tensor) == len(flags):
                tensor.copy_(torch.maximum(tensor, torch.tensor(flags, dtype=tensor.dtype)))

        monkeypatch.setattr(torch.distributed, "all_reduce", reduced)

    return set_to


def test_a_run_that_goes_on_in_fp8_has_no_passes(machine, capsys):
    """A resumed run is exact: its scales are those of the checkpoint."""
    run = Run(Model())
    run()
    for again in (Run(run.model), Run(run.model)):
        again()
        assert again.read == [[0, 1]]
    assert capsys.readouterr().out.count(SAID) == 1


def test_all_ranks_decide_alike(others):
    fresh, run = Model(), Model()
    for module in run.modules():
        if isinstance(module, Product):
            module(torch.ones(1, module.weight.shape[1]))
            module.fp8_meta["scaling_fwd"].update()
    others(0, 0)
    missing = first_scales.are_missing
    assert missing([fresh], starts=True) and missing([fresh], starts=False)
    assert not missing([run], starts=True) and not missing([nn.Linear(2, 2)], starts=True)
    # Another rank has scales: training goes on in FP8. It has none: training starts.
    others(1, 0)
    assert not missing([fresh], starts=False) and missing([fresh], starts=True)
    others(0, 1)
    assert not missing([run], starts=False) and missing([run], starts=True)
    # Summary projections are new in a model that starts from a dense one in FP8.
    some = Model()
    some.layers[0][0] = run.layers[0][0]
    others(0, 0)
    assert missing([some], starts=True) and not missing([some], starts=False)


@pytest.mark.parametrize(
    ("fp8", "recipe", "expected"), [("hybrid", "delayed", 1), ("hybrid", "tensorwise", 0), (None, "delayed", 0)]
)
def test_other_recipes_need_none(fp8, recipe, expected):
    args = argparse.Namespace(
        cuda_graph_impl="none", check_for_nan_in_loss_and_grad=False, padded_vocab_size=64, async_save=False, fp8=fp8,
        fp8_recipe=recipe, load=None, save=None,
    )  # fmt: skip
    patches = trainer_patches(args, RunSettings(KSAConfig(enabled=True), None), SimpleNamespace(is_needed=False))
    assert sum(patch.target == TRAIN_STEP.target for patch in patches) == expected
