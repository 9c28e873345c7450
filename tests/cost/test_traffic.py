"""What context parallelism sends, counted on the wire, and the numbers that the log reports."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes
from wire import bytes_sent, counts_sent_bytes

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.context_parallel.attention import context_parallel_attention
from megatron_ksa.context_parallel.plan import sees_summaries
from megatron_ksa.cost import traffic
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.layout.zigzag import ZigZag

SIZE, TEXT, GROUPS, DIM = 4, 4096, 2, 32
HEADS = traffic.HeadShape(query=GROUPS, kv=GROUPS, dim=DIM, element_bytes=4)
GEOMETRIES = {
    "ksa": KSAGeometry(8, 1, 8),
    "window of three segments": KSAGeometry(8, 1, 192),
    "large-window": KSAGeometry(8, 1, 512),
    "full": KSAGeometry(1, 0, TEXT),
}


def measured() -> dict[str, list[int]]:
    """Bytes that this rank sends in the forward and the backward pass of each kind of layer."""
    group, split, sent = dist.group.WORLD, ZigZag(dist.get_rank(), SIZE), {}
    for name, geometry in GEOMETRIES.items():
        text_rows = TEXT // SIZE
        layout = RowLayout(geometry.chunk_size, geometry.summary_tokens)
        rows = torch.randn(layout.total_rows(text_rows), 1, GROUPS, DIM, requires_grad=True)
        for _ in range(2):  # the first pass connects what gloo connects on demand
            dist.barrier()
            counts = [bytes_sent()]
            out = context_parallel_attention(rows, rows, rows, geometry, text_rows=text_rows, split=split, group=group)
            dist.barrier()
            counts.append(bytes_sent())
            out.sum().backward()
            dist.barrier()
            sent[name] = [counts[1] - counts[0], bytes_sent() - counts[1]]
    # Connections of a rank that has ended are closed here too, and their bytes count no more.
    dist.barrier()
    return sent


@pytest.mark.slow
@pytest.mark.skipif(not counts_sent_bytes(), reason="TCP_INFO of this kernel does not count sent bytes")
def test_the_wire_carries_what_is_reported(tmp_path):
    """Gloo's headers and the barriers are the only bytes beside keys and values and their gradients. Its reduce-scatter
    is an all-reduce, which sends twice as much.
    """
    for rank, sent in enumerate(run_processes(measured, SIZE, tmp_path)):
        for name, geometry in GEOMETRIES.items():
            for backward in (False, True):
                split = ZigZag(rank, SIZE)
                rows = traffic.rows_sent(geometry, TEXT, split, backward=backward)
                if backward and sees_summaries(geometry, TEXT):
                    rows += TEXT // geometry.chunk_size // SIZE * (SIZE - 1)
                expected = rows * HEADS.kv_row_bytes
                assert expected <= sent[name][backward] <= 1.01 * expected + 4096, (rank, name, backward)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 80))
def test_bound_of_rows_sent(chunk_size, chunks_a_segment, summary_tokens, size, window):
    """No rank sends more than n * S / C + 2 * W * C rows, nor more text than the all-gather of full attention."""
    text = 2 * size * chunks_a_segment * chunk_size
    geometry = KSAGeometry(chunk_size, summary_tokens, window)
    for rank, backward in itertools.product(range(size), (False, True)):
        rows = traffic.rows_sent(geometry, text, ZigZag(rank, size), backward=backward)
        summaries = text // chunk_size * summary_tokens
        assert rows <= summaries + 2 * window * chunk_size
        assert rows <= summaries + traffic.all_gather_rows(text, size)


def test_a_seventh_of_full_attention_at_128k():
    """n = 128k, C = 8, W = 128, eight ranks: 14,336 rows of summaries and 2,048 of halos against 114,688."""
    rows = max(traffic.rows_sent(KSAGeometry(8, 1, 128), 131072, ZigZag(rank, 8)) for rank in range(8))
    assert rows == 16384 and traffic.all_gather_rows(131072, 8) == 7 * rows


def test_report_has_a_line_for_each_kind_of_layer():
    ksa = KSAConfig(enabled=True, layer_pattern="kklf", window_chunks="[128]*3+[1]")
    lines = traffic.report(ksa, 4, 131072, 8, "p2p", traffic.HeadShape(8, 1, 128, 2)).splitlines()
    assert "58.720 MB" in lines[0]
    assert [line.split(",")[0].strip() for line in lines[1:]] == ["2 x ksa", "1 x large-window", "1 x full"]
    assert lines[1].endswith("8.389 MB, 1/7.0") and lines[3].endswith("58.720 MB, 1/1.0")
    dense = traffic.report(KSAConfig(), 2, 4096, 2, ["p2p", "a2a"], traffic.HeadShape(8, 8, 128, 2))
    assert [line.strip()[:15] for line in dense.splitlines()[1:]] == ["1 x full, p2p: ", "1 x full, a2a: "]
