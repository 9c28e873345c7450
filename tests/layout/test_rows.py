import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ksa.errors import UsageError
from megatron_ksa.layout.rows import RowLayout, document_starts, document_starts_from_cu_seqlens, row_positions


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 200), st.integers(0, 8))
def test_text_rows_inverts_total_rows(chunk_size, summary_tokens, n, offset):
    layout = RowLayout(chunk_size, summary_tokens, offset % chunk_size)
    assert layout.text_rows(layout.total_rows(n)) == n


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 8), st.integers(0, 200))
def test_rows_that_no_text_has_are_refused(chunk_size, summary_tokens, offset, rows):
    """Two shards of a text and a half chunk each gave rows that were split in the wrong place without a word."""
    layout = RowLayout(chunk_size, summary_tokens, offset % chunk_size)
    if any(layout.total_rows(n) == rows for n in range(rows + 1)):
        text, summaries = layout.split(torch.empty(rows))
        assert layout.total_rows(len(text)) == rows and layout.summary_rows(len(text)) == len(summaries)
    else:
        with pytest.raises(UsageError, match=f"{rows} rows are no text rows.*--ksa-chunk-size"):
            layout.split(torch.empty(rows))


@given(st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(1, 30), min_size=1))
def test_steps_have_the_rows_and_positions_of_the_whole(chunk_size, summary_tokens, steps):
    """Incremental decoding: each step's layout starts where the one before ended."""
    text, summaries, start = [], [], 0
    for step in steps:
        layout = RowLayout(chunk_size, summary_tokens, start % chunk_size)
        parts = layout.split(row_positions(layout, step, None, "cpu") + start)
        for whole, part in zip((text, summaries), parts, strict=True):
            whole.extend(part[:, 0].tolist())
        start += step
    assert text + summaries == row_positions(RowLayout(chunk_size, summary_tokens), start, None, "cpu")[:, 0].tolist()


def test_grow_and_shrink():
    layout = RowLayout(2, 2)
    text, embedding = torch.randn(5, 3, 4), torch.randn(2, 4)
    rows = layout.grow(text, embedding)
    assert rows.shape == (9, 3, 4)
    assert torch.equal(rows[5:], embedding.repeat(2, 1)[:, None].expand(4, 3, 4))
    assert torch.equal(layout.shrink(rows), text)


def test_positions_of_summaries():
    """For S = 1 the last text token of the chunk; for S > C never before the chunk's first token."""
    assert row_positions(RowLayout(4, 1), 8, None, "cpu")[8:, 0].tolist() == [3, 7]
    assert row_positions(RowLayout(4, 2), 8, None, "cpu")[8:, 0].tolist() == [1, 3, 5, 7]
    assert row_positions(RowLayout(2, 3), 4, None, "cpu")[4:, 0].tolist() == [0, 0, 1, 2, 2, 3]


def test_positions_restart_with_documents():
    """A summary belongs to the document of its chunk's last token and has no position before that document."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    start = document_starts(position_ids)
    assert start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]
    positions = row_positions(RowLayout(4, 2), 8, start, "cpu")[:, 0].tolist()
    assert positions[:8] == position_ids[0].tolist()
    # Chunk 0 ends in document 2 (token 3): both summaries have its position 0. Chunk 1 ends in document 3 (token 7).
    assert positions[8:] == [0, 0, 0, 0]


def test_document_starts_from_cu_seqlens():
    starts = document_starts_from_cu_seqlens(torch.tensor([0, 3, 7, 8], dtype=torch.int32))
    assert starts.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]
