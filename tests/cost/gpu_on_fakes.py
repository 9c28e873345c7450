"""Peak memory of the GPU's code path without a GPU: its operations on fake tensors, which have sizes and no values.

Kernels are replaced by what they save and return. Those that are custom ops have such stand-ins already.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import single_process
import torch
from megatron.core import tensor_parallel
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import layers
from single_process import build_model, process_groups, transformer_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import megatron_ksa.context_parallel.attention
import megatron_ksa.kernels.dispatch
import megatron_ksa.kernels.rotation.triton_rotation  # noqa: F401 (custom ops cannot be made among fake tensors)
import megatron_ksa.model.chunked_loss
import megatron_ksa.model.core_attention
import megatron_ksa.model.distillation_loss
import megatron_ksa.model.gpt
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import Recompute
from megatron_ksa.context_parallel import exchange
from megatron_ksa.cost.live_memory import LiveMemory
from megatron_ksa.kernels.distillation import RowStatistics
from megatron_ksa.model.chunked_loss import ChunkedLoss
from megatron_ksa.model.distillation_loss import DistillationLoss
from megatron_ksa.model.norm import Norm
from megatron_ksa.model.recompute import set_recompute
from megatron_ksa.upstream import embedding


class _CuDNN(torch.autograd.Function):
    """What cuDNN's causal attention saves and returns."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(rows) for rows in ctx.saved_tensors[:3])


class _RMSNorm(torch.autograd.Function):
    """What torch's RMS norm saves and returns on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(d_out), torch.empty_like(ctx.saved_tensors[1])


def _statistics(logits: Tensor, *_) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))


@pytest.fixture
def gpu_path(monkeypatch):
    """Let models take the kernels' path, for fake tensors."""
    process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    for module in (megatron_ksa.kernels.dispatch, megatron_ksa.model.gpt):
        monkeypatch.setattr(module, "uses_triton", lambda op, rows: True)
    monkeypatch.setattr(
        megatron_ksa.model.core_attention, "causal_attention", lambda q, k, v, scale=None: _CuDNN.apply(q, k, v)
    )
    for passes in ("ksa_forward", "ksa_backward", "merge_into"):
        monkeypatch.setattr(megatron_ksa.context_parallel.attention, passes, lambda *_: None)
    monkeypatch.setattr(Norm, "_normalize", lambda norm, x, shape, weight, bias: _RMSNorm.apply(x, weight))
    monkeypatch.setattr(fused_bias_swiglu, "swiglu", lambda y: y.new_empty(*y.shape[:-1], y.shape[-1] // 2))
    monkeypatch.setattr(fused_bias_swiglu, "swiglu_back", lambda gradient, y: torch.empty_like(y))
    loss = megatron_ksa.model.chunked_loss
    monkeypatch.setattr(loss, "statistics", _statistics)
    monkeypatch.setattr(loss, "gradients", lambda logits, *_: logits)
    monkeypatch.setattr(loss, "_add_product", lambda total, d_logits, rows, fused: None)
    distillation = megatron_ksa.model.distillation_loss
    monkeypatch.setattr(
        distillation, "statistics", lambda ours, *_: RowStatistics(*(_statistics(ours) + _statistics(ours)))
    )
    monkeypatch.setattr(distillation, "gradients", lambda ours, *_: ours)
    monkeypatch.setattr(embedding, "add_rows", lambda words, d_out, total: None)
    product = SimpleNamespace(wgrad_gemm_accum_fp32=lambda *_: None)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", product, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    # Its device index would be that of a GPU to a fake tensor.
    monkeypatch.setattr(layers, "torch", _OnCpu())


@pytest.fixture
def ranks_of_two(monkeypatch) -> Iterator[int]:
    """Two context-parallel ranks, the one after the other that of the next models; no collective does anything."""
    groups = process_groups()
    monkeypatch.setattr(single_process, "process_groups", lambda: groups)
    sent = SimpleNamespace(wait=lambda: None)
    collectives = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    monkeypatch.setattr(exchange, "dist", SimpleNamespace(**{name: lambda *_, **__: sent for name in collectives}))

    def each() -> Iterator[int]:
        for rank in range(2):
            monkeypatch.setattr(groups, "cp", SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2))
            yield rank

    return each()


class _OnCpu:
    """torch, whose current device is the CPU."""

    cuda = SimpleNamespace(current_device=lambda: "cpu")

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextlib.contextmanager
def _counted(model: torch.nn.Module) -> Iterator[LiveMemory]:
    """Count what lives beside the parameters and their gradients, which are set up as in training."""
    memory = LiveMemory()
    for parameter in model.parameters():
        parameter.main_grad = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
        memory.count([parameter, parameter.main_grad], free=True)
    memory.count(model.buffers(), free=True)
    with memory:
        yield memory


def peaks(
    ksa: KSAConfig, length: int, recompute: Recompute, sizes: dict, *, loss: LossConfig, distill: bool = False, **model
) -> tuple[int, int, int]:  # fmt: skip
    """Bytes beside parameters, gradients and optimizer state in a step of one micro-batch in bfloat16.

    Args:
        sizes: fields of `TransformerConfig`; a context-parallel size of 2 goes with the fixture `ranks_of_two`.
        model: further fields of `KSAGPTModelConfig`.

    Returns:
        Those alive before the loss, and the most at once during the loss and during the layers' backward pass.
    """
    config = transformer_config(
        **{"params_dtype": torch.bfloat16, "bf16": True, "bias_activation_fusion": True,
           "gradient_accumulation_fusion": True, "init_method": lambda weight: weight, **sizes}
    )  # fmt: skip
    config.output_layer_init_method = config.embedding_init_method = config.init_method
    settings = DistillConfig(enabled=distill)
    found: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = build_model(
            ksa, config, seq_length=length, text_length=length, share_embeddings_and_output_weights=False,
            distill=settings, **model,
        )  # fmt: skip
        for parameter in built.parameters():
            # A fake parameter cannot be swapped for another, as `model.bfloat16()` does.
            parameter.data = parameter.data.bfloat16()
        set_recompute(built, recompute)
        if distill:
            built.distillation.set_scale(1.0)
        compute = DistillationLoss(loss, settings) if distill else ChunkedLoss(loss)
        own = length // config.context_parallel_size
        tokens = torch.zeros(1, own, dtype=torch.int64)
        with _counted(built) as memory:

            def marked(*, hidden_states: Tensor, **kwargs) -> Tensor:
                def done(_: Tensor) -> None:
                    found.append(memory.peak)
                    memory.begin_phase()

                found.append(memory.live)
                memory.begin_phase()
                hidden_states.register_hook(done)
                result = compute(hidden_states=hidden_states, **kwargs)
                return result.total if distill else result

            positions = torch.arange(own).expand(1, own)
            built(tokens, positions, labels=tokens, output_processor=marked).float().sum().backward()
            return found[0], found[1], memory.peak
