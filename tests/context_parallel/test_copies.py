"""What one rank copies and adds up around the kernels of a layer: halos, summaries and dQ, and nothing else."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ksa.context_parallel import attention, exchange
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.zigzag import ZigZag

TEXT, CHUNK, WINDOW, DIM = 256, 4, 3, 8
HALO, SEGMENT, SUMMARIES = WINDOW * CHUNK, TEXT // 4, TEXT // CHUNK // 4
FREE = {"new_empty", "empty_like", "empty", "detach", "alias"}


class Rows(TorchDispatchMode):
    """Rows that operations write, by operation; a row is one of keys or of values alone, or of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.written = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if isinstance(result, torch.Tensor) and name not in FREE and not function.is_view:
            self.written[name] += result.numel() // DIM
        return result


@pytest.fixture
def without_kernels(monkeypatch):
    """Neither kernels nor collectives do anything."""
    for name in ("ksa_forward", "ksa_backward", "merge_into"):
        monkeypatch.setattr(attention, name, lambda *_: None)
    sent = SimpleNamespace(wait=lambda: None)
    collectives = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    monkeypatch.setattr(exchange, "dist", SimpleNamespace(**{name: lambda *_, **__: sent for name in collectives}))


@pytest.mark.parametrize("rank", [0, 1])
def test_copies_of_a_layer(without_kernels, rank):
    """A layer wrote 2.9 to 3.6 GB in copies in its backward pass where it now writes 0.4 to 0.6 (65,536 rows a rank):
    text and summaries joined, gradients of slices as large as all keys, sums of halos copied onto themselves.
    """
    geometry, rows = KSAGeometry(CHUNK, 1, WINDOW), 2 * (SEGMENT + SUMMARIES)
    heads = [torch.zeros(rows, 1, 1, DIM).requires_grad_() for _ in range(3)]
    with Rows() as forward:
        out = attention.context_parallel_attention(
            *heads, geometry, text_rows=2 * SEGMENT, split=ZigZag(rank, 2), group=None
        )
    d_out = torch.zeros_like(out)
    with Rows() as backward:
        out.backward(d_out)
    sources = [segment for segment in ZigZag(rank, 2).segments() if segment]
    # A halo to send; summaries to send, and those before the last segment put in order. Keys and values each.
    assert forward.written == {"copy_": 2 * HALO, "stack": 2 * 2 * SUMMARIES, "cat": 2 * sources[-1] * SUMMARIES}
    # Gradients of summaries joined in the order of ranks, with zeros for one segment; sums of dQ of those segments that
    # see others, of halos that come back or are the rank's own, and of both segments' summaries.
    halos = 2 * HALO * (1 + rank)
    summaries = 2 * 2 * SUMMARIES + (2 * sources[0] * SUMMARIES if len(sources) > 1 else 0)
    assert backward.written == {
        "cat": 2 * 4 * SUMMARIES, "zeros_like": 2 * SUMMARIES, "add_": len(sources) * SEGMENT + halos + summaries,
    }  # fmt: skip
