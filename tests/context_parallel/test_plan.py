"""Which text rows travel where."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ksa.context_parallel.plan import HaloPlan, route
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


@given(plans)
def test_halos_lie_where_their_rows_are(plan):
    """By the position of every row that is kept for the halos of a rank, and of those that it holds."""
    for rank in range(plan.split.size):
        plan = HaloPlan(ZigZag(rank, plan.split.size), plan.segment_rows, plan.halo_rows)
        way = route(plan)
        kept = [list(rows) for rows in plan.needed(rank)] if way.joined else [[row for p in way.incoming for row in p]]
        own = [list(plan.segment(segment)) for segment in plan.split.segments()]
        read = []
        for segment, place in zip(plan.split.segments(), way.places, strict=True):
            rows = [] if place is None else (own if place.own else kept)[place.index][place.rows]
            assert rows == list(plan.halo(segment))
            read.append(set(rows) if place and not place.own else set())
        assert set().union(*kept) == read[0] | read[1]
        assert way.overlap == bool(read[0] & read[1])
