"""Loss in chunks of tokens: the numbers of Megatron's output layer and cross-entropy, without their logits."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from compare import assert_close
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, layers, vocab_parallel_cross_entropy
from processes import run_processes
from single_process import build_model, process_groups, random_tokens, transformer_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LOGITS_LIMIT, LossConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.model.chunked_loss import ChunkedLoss, chunked_cross_entropy
from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform

TOLERANCE = 1e-6
KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="1")
N, BATCH, HIDDEN, WORDS = 24, 2, 16, 40


@dataclass(frozen=True)
class Case:
    """Tokens at a time (ragged tails among them), ranks, and how the rows are laid out."""

    rows: int
    tp: int = 1
    sequence_parallel: bool = False
    scale: float = 1.0


CASES = [
    Case(16),
    Case(10),
    Case(1, scale=0.5),
    Case(14, tp=2),
    Case(14, tp=2, sequence_parallel=True),
    Case(20, tp=2, sequence_parallel=True, scale=2.0),
]


def backward(losses: torch.Tensor, d_losses: torch.Tensor) -> None:
    """As Megatron's schedules run it, which the CPU platform knows."""
    torch.autograd.backward((losses,), grad_tensors=(d_losses,), retain_graph=False, create_graph=False, inputs=None)


def both_ways(case: Case) -> list[list[torch.Tensor]]:
    """[losses, gradient of hidden states, gradient of this rank's weight]: Megatron's, and in chunks."""
    group = parallel_state.get_tensor_model_parallel_group()
    config = transformer_config(
        hidden_size=HIDDEN, tensor_model_parallel_size=case.tp, sequence_parallel=case.sequence_parallel
    )
    torch.manual_seed(0)
    layer = ColumnParallelLinear(
        HIDDEN, WORDS, config=config, init_method=torch.nn.init.normal_, bias=False, tp_group=group
    )
    hidden, d_losses = torch.randn(N, BATCH, HIDDEN), torch.randn(BATCH, N)
    labels = torch.randint(WORDS, (BATCH, N))
    if case.sequence_parallel:
        hidden = hidden.chunk(case.tp)[group.rank()].clone()
    hidden.requires_grad_()
    plain = vocab_parallel_cross_entropy(layer(hidden)[0] * case.scale, labels.t().contiguous(), tp_group=group).t()
    chunked = chunked_cross_entropy(
        hidden, layer.weight, labels, case.rows, group, sequence_parallel=case.sequence_parallel, scale=case.scale
    )
    results = []
    for losses in (plain, chunked):
        hidden.grad = layer.weight.grad = None
        backward(losses, d_losses)
        results.append([losses.detach(), hidden.grad, layer.weight.grad])
    return results


def every_case() -> list[list[list[torch.Tensor]] | None]:
    activate_cpu_platform()
    results = []
    for tp in (1, 2):
        parallel_state.initialize_model_parallel(tp)
        results += [both_ways(case) for case in CASES if case.tp == tp]
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list]:
    return run_processes(every_case, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_give_megatrons_loss_and_gradients(case, results):
    for rank in results:
        plain, chunked = rank[CASES.index(case)]
        for name, actual, expected in zip(("losses", "d hidden", "d weight"), chunked, plain, strict=True):
            assert_close(name, actual, expected, TOLERANCE)


def test_sixteen_bit_chunks_are_as_exact_as_megatrons():
    """Against float64; the weight's gradient is summed over chunks in float32 and rounded once."""
    group = process_groups().tp
    torch.manual_seed(0)
    exact = torch.randn(N, BATCH, HIDDEN).bfloat16(), torch.randn(WORDS, HIDDEN).bfloat16()
    labels, d_losses = torch.randint(WORDS, (BATCH, N)), torch.randn(BATCH, N)

    def gradients(dtype: torch.dtype, losses_of) -> list[torch.Tensor]:
        hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in exact)
        losses = losses_of(hidden, weight)
        return [losses, *torch.autograd.grad(losses, (hidden, weight), d_losses.to(losses.dtype))]

    def plain(hidden, weight):
        words = (hidden @ weight.t()).flatten(0, 1)
        return torch.nn.functional.cross_entropy(words, labels.t().flatten(), reduction="none").view(N, BATCH).t()

    expected = gradients(torch.float64, plain)
    actual = gradients(torch.bfloat16, lambda *inputs: chunked_cross_entropy(*inputs, labels, 4, group))
    for name, one, other in zip(("losses", "d hidden", "d weight"), actual, expected, strict=True):
        assert_close(name, one, other, 1e-2)


def pass_of(model: torch.nn.Module, rows: int, steps: int = 2) -> list[torch.Tensor]:
    """Losses of micro-batches, backward passes included."""
    losses = []
    for step in range(steps):
        tokens, labels = random_tokens(BATCH, 32, seed=step), random_tokens(BATCH, 32, seed=step + 10)
        loss = model(tokens, None, labels=labels, output_processor=ChunkedLoss(LossConfig(rows)))
        backward(loss, torch.ones_like(loss))
        losses.append(loss.detach())
    return losses


class FusedKernels(SimpleNamespace):
    """What apex's kernel does: add the product to the gradient's buffer."""

    calls = 0

    def wgrad_gemm_accum_fp32(self, rows: torch.Tensor, d_out: torch.Tensor, main_grad: torch.Tensor) -> None:
        self.calls += 1
        main_grad.add_(d_out.flatten(0, -2).t() @ rows.flatten(0, -2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_gradient_reaches_main_grad_once_a_micro_batch(monkeypatch, tied, fused, distributed_optimizer):
    """Two micro-batches in Megatron's DDP with its overlapped reduction, which refuses a second report of a weight."""
    kernels = FusedKernels()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    process_groups()
    grads, losses, calls = [], [], []
    for rows in (0, 10):
        config = transformer_config(num_layers=1, gradient_accumulation_fusion=fused)
        model = build_model(KSA, config, share_embeddings_and_output_weights=tied)
        ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=distributed_optimizer),
            model,
        )
        kernels.calls = 0
        with ddp.no_sync():
            first = pass_of(ddp, rows, steps=1)
        losses.append(first + pass_of(ddp, rows, steps=1))
        ddp.finish_grad_sync()
        calls.append(kernels.calls)
        grads.append({name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
    assert_close("losses", torch.stack(losses[1]), torch.stack(losses[0]), TOLERANCE)
    for name, expected in grads[0].items():
        assert_close(name, grads[1][name], expected, TOLERANCE)
    # 64 tokens of a micro-batch, 10 at a time: five positions of two samples, seven chunks instead of one product.
    assert calls[1] - calls[0] == (2 * 6 if fused else 0)


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is the vocabulary, which nothing else in the model has."""

    words, rows = 76, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.t.default:
            return out  # a view of the output layer's weight
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.words,):
                self.rows = max(self.rows, tensor.numel() // self.words)
        return out


@pytest.mark.parametrize(("rows", "largest"), [(0, 64), (10, 10), (64, 64)])
def test_no_more_logits_than_a_chunk_ever_exist(rows, largest):
    model = build_model(
        KSA, transformer_config(num_layers=1), share_embeddings_and_output_weights=False, vocab_size=LargestLogits.words
    )
    with LargestLogits() as seen:
        pass_of(model, rows)
    assert seen.rows == largest


def test_without_gradient_and_with_a_frozen_output_layer():
    model = build_model(KSA, transformer_config(num_layers=1), share_embeddings_and_output_weights=False)
    expected = pass_of(model, 0, steps=1)
    model.output_layer.weight.requires_grad_(False)
    assert_close("losses", pass_of(model, 10, steps=1)[0], expected[0], TOLERANCE)
    assert model.output_layer.weight.grad is not None  # of the first pass only
    with torch.no_grad():
        labels = random_tokens(BATCH, 32, seed=10)
        losses = model(
            random_tokens(BATCH, 32), None, labels=labels, output_processor=ChunkedLoss(LossConfig(chunk_rows=10))
        )
    assert_close("losses", losses, expected[0], TOLERANCE)


def test_rows_at_a_time():
    unset = LossConfig()
    assert unset.rows_at_a_time(8192, 32_000) == 8192  # 1,048,576,000 bytes
    assert unset.rows_at_a_time(131_072, 151_936) == 1024
    assert 4 * 1024 * 151_936 <= LOGITS_LIMIT < 4 * 2048 * 151_936
    assert LossConfig(0).rows_at_a_time(131_072, 151_936) == 131_072
    assert LossConfig(500).rows_at_a_time(131_072, 151_936) == 500
    assert LossConfig(500).rows_at_a_time(64, 151_936) == 64
    with pytest.raises(UsageError, match="--loss-chunk-rows is -1"):
        LossConfig(-1)


def test_logits_are_kept_where_they_are_small_and_do_not_go_at_once():
    unset = LossConfig()
    assert unset.keeps_logits(8192, 151_936, 2)  # 2.3 GiB
    assert not unset.keeps_logits(16_384, 151_936, 2)
    assert not unset.keeps_logits(8192, 32_000, 2)  # at once
    assert not LossConfig(4096).keeps_logits(8192, 151_936, 2)
    assert LossConfig(4096, kept_logits=3).keeps_logits(8192, 151_936, 2)
    assert not LossConfig(kept_logits=0).keeps_logits(8192, 151_936, 2)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--loss-kept-logits is"):
            LossConfig(kept_logits=bad)


@pytest.mark.parametrize("rows", [10, 24, 1000])
def test_kept_logits_give_the_same_bits(rows):
    """A second backward pass, which finds none, computes them again."""
    group = process_groups().tp
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, BATCH, HIDDEN, requires_grad=True), torch.randn(WORDS, HIDDEN, requires_grad=True)
    labels, d_losses = torch.randint(WORDS, (BATCH, N)), torch.randn(BATCH, N)
    results = []
    for keeps in (False, True):
        losses = chunked_cross_entropy(hidden, weight, labels, rows, group, keeps=keeps)
        assert len(losses.grad_fn.logits) == (-(-N // max(rows // BATCH, 1)) if keeps else 0)
        for _ in range(2):
            results.append([losses, *torch.autograd.grad(losses, (hidden, weight), d_losses, retain_graph=True)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_model_keeps_logits_in_training_alone(monkeypatch):
    from megatron_ksa.config import loss
    from megatron_ksa.model import chunked_loss

    monkeypatch.setattr(loss, "LOGITS_LIMIT", 1000)
    kept = []

    def watched(*args, keeps, **options):
        kept.append((args[3], keeps))
        return chunked_cross_entropy(*args, keeps=keeps, **options)

    monkeypatch.setattr(chunked_loss, "chunked_cross_entropy", watched)
    model = build_model(KSA, transformer_config(num_layers=1), share_embeddings_and_output_weights=False)
    inputs = {"labels": random_tokens(BATCH, 32, seed=10)}
    for config in (LossConfig(), LossConfig(10), LossConfig(10, kept_logits=1.0), LossConfig(kept_logits=0.0)):
        model(random_tokens(BATCH, 32), None, **inputs, output_processor=ChunkedLoss(config))
    with torch.no_grad():
        model(random_tokens(BATCH, 32), None, **inputs, output_processor=ChunkedLoss(LossConfig()))
    assert [keeps for _, keeps in kept] == [True, False, True, False, False]
    assert kept[0][0] == BATCH * 32 and kept[2][0] == BATCH * 32 and kept[4][0] < BATCH * 32
