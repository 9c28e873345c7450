"""Attention over context-parallel ranks, forward and backward, against the reference on the whole sequence."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from processes import run_processes

from megatron_ksa.context_parallel.attention import context_parallel_attention
from megatron_ksa.context_parallel.ulysses import all_to_all_attention
from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.layout.zigzag import ZigZag

pytestmark = pytest.mark.slow
PROCESSES = 4
BATCH, HEADS, DIM = 2, 4, 8


@dataclass(frozen=True)
class Case:
    """One layer: summaries 0 is full attention."""

    size: int
    text: int
    chunk: int
    summaries: int
    window: int
    documents: bool = False
    groups: int = 2
    comm: str = "p2p"

    @property
    def geometry(self) -> KSAGeometry:
        return KSAGeometry(self.chunk, self.summaries, self.window)

    @property
    def layout(self) -> RowLayout:
        return RowLayout(self.chunk, self.summaries)


CASES = [
    Case(2, 64, 4, 1, 1),
    Case(2, 64, 4, 1, 1, documents=True),
    Case(2, 64, 4, 2, 0),
    Case(2, 72, 3, 2, 5, documents=True),  # a halo of most of a segment, an odd chunk size
    Case(4, 96, 3, 2, 2, documents=True),
    Case(4, 96, 3, 1, 9),  # three segments wide
    Case(4, 96, 3, 1, 9, documents=True),
    Case(4, 96, 3, 1, 17),  # meets the rank's own first segment
    Case(4, 96, 3, 1, 31, documents=True),  # just no summary is seen
    Case(4, 96, 3, 1, 30),  # one summary is seen, by the last chunk
    Case(4, 96, 3, 1, 1000),
    Case(4, 96, 1, 0, 96),
    Case(4, 96, 1, 0, 96, documents=True),
    Case(4, 96, 3, 2, 0, documents=True, groups=1),  # no halo
    Case(4, 96, 3, 0, 0),  # nothing is exchanged
    Case(4, 96, 3, 0, 2, documents=True),  # a window without summaries
    Case(3, 48, 4, 1, 3, groups=4),
    Case(4, 96, 3, 1, 2, groups=1),
    Case(4, 96, 3, 1, 5, groups=4),
    Case(4, 96, 3, 1, 4, documents=True),  # as long as a segment: the last rank's halos meet
    Case(4, 96, 3, 1, 6),  # halos that share rows, the second one without the first one's beginning
    Case(2, 64, 4, 1, 1, comm="a2a"),
    Case(4, 96, 3, 2, 9, documents=True, comm="a2a"),
    Case(4, 96, 3, 2, 9, groups=4, comm="a2a"),
    Case(4, 96, 1, 0, 96, documents=True, groups=1, comm="a2a"),
]


def inputs(case: Case) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Query, key, value and the output's gradient of the whole sequence, float64 [rows, batch, heads, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    rows = case.layout.total_rows(case.text)
    tensors = [
        torch.randn(rows, BATCH, heads, DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS, case.groups, case.groups, HEADS)
    ]
    starts = None
    if case.documents:
        first = torch.rand(BATCH, case.text, generator=generator) < 0.08
        starts = (first * torch.arange(case.text)).cummax(dim=1).values.int()
    return tensors, starts


def whole(case: Case, starts: torch.Tensor | None, *rows: torch.Tensor) -> torch.Tensor:
    text = case.layout.text_rows(rows[0].shape[0])
    by_batch = (tensor.transpose(0, 1) for tensor in rows)
    return ksa_attention(*by_batch, case.geometry, text_rows=text, document_start=starts).transpose(0, 1)


def on_this_rank(case: Case, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Output and gradients of q, k, v of this rank's rows."""
    split = ZigZag(group.rank(), group.size())
    tensors, starts = inputs(case)
    q, k, v, d_out = (
        torch.cat([split.take(part) for part in case.layout.split(tensor)]).requires_grad_() for tensor in tensors
    )
    if case.comm == "a2a":
        out = all_to_all_attention(
            lambda *rows: whole(case, starts, *rows), q, k, v, layout=case.layout, split=split, group=group
        )
    else:
        out = context_parallel_attention(
            q, k, v, case.geometry, text_rows=case.text // case.size, split=split, group=group, document_start=starts
        )
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def every_case() -> list[list[torch.Tensor] | None]:
    groups = {size: dist.new_group(list(range(size))) for size in {case.size for case in CASES}}
    mine = dist.get_rank()
    return [on_this_rank(case, groups[case.size]) if mine < case.size else None for case in CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list]:
    return run_processes(every_case, PROCESSES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_does(case, results):
    (*tensors, d_out), starts = inputs(case)
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    out = whole(case, starts, q, k, v)
    expected = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
    parts = [results[rank][CASES.index(case)] for rank in range(case.size)]
    for name, tensor, *shards in zip(("out", "dq", "dk", "dv"), expected, *parts, strict=True):
        split = ZigZag(0, case.size)
        by_kind = zip(*(case.layout.split(shard) for shard in shards), strict=True)
        actual = torch.cat([split.restore(torch.cat(kind)) for kind in by_kind])
        assert_close(name, actual, tensor)
