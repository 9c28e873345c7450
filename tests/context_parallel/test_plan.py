"""Which text rows travel where."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ksa.context_parallel.plan import HaloPlan
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
