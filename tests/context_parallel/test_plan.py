"""Which text rows travel where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ksa.context_parallel.plan import HaloPlan, fewest_passes
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.layout.zigzag import ZigZag

plans = st.builds(
    lambda size, segment_rows, halo_rows: HaloPlan(ZigZag(0, size), segment_rows, halo_rows),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 40),
)


def owned(plan, rank):
    """Text positions that a rank holds, in its order."""
    return [row for segment in plan.split.segments(rank) for row in plan.segment(segment)]


@given(plans)
def test_a_rank_gets_its_halos_and_nothing_twice(plan):
    for rank in range(plan.split.size):
        held = set(owned(plan, rank))
        received = [row for source in range(plan.split.size) if source != rank
                    for piece in plan.pieces(source, rank) for row in piece]  # fmt: skip
        halos = {row for segment in plan.split.segments(rank) for row in plan.halo(segment)}
        assert sorted(received) == sorted(halos - held)


@given(plans)
def test_sources_make_up_each_halo_in_order(plan):
    for rank in range(plan.split.size):
        for halo, pieces in zip(plan.needed(rank), plan.sources(rank), strict=True):
            assert [row for _, piece in pieces for row in piece] == list(halo)
            for source, piece in pieces:
                segment, rows = plan.held(source, piece)
                assert plan.segment(plan.split.segments(source)[segment])[rows] == piece
                assert piece in plan.pieces(source, rank)


@given(plans)
def test_queries_behind_the_head_see_nothing_before_their_segment(plan):
    for index in range(1, 2 * plan.split.size):
        segment, head = plan.segment(index), plan.head(index)
        assert list(segment[: len(head)]) == list(head)
        assert all((row - plan.halo_rows < segment.start) == (row in head) for row in segment)
    assert not plan.head(0)


@pytest.mark.parametrize(
    ("window", "size", "heads", "kv_heads", "passes"),
    [
        (128, 2, 16, 16, 1), (1024, 2, 16, 16, 1), (16384, 2, 16, 16, 2),
        # 2 x 8192 rows of halos and 12,288 summaries, 32,768 queries; then 14,336 and 16,384.
        (1024, 4, 16, 16, 1), (1024, 8, 16, 16, 2), (128, 8, 16, 16, 1), (128, 16, 16, 16, 2), (128, 16, 16, 4, 1),
        # The halo is as long as a segment.
        (1024, 8, 16, 1, 2), (1023, 8, 16, 1, 1),
    ],
)  # fmt: skip
def test_one_pass_where_no_more_keys_arrive_than_there_are_queries(window, size, heads, kv_heads, passes):
    assert fewest_passes(KSAGeometry(8, 1, window), 131072, size, heads, kv_heads) == passes
