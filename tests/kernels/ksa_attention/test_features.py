"""KSA attention in the interpreter at the head dimensions and dtypes that models have."""

import pytest
import torch
from attention_cases import compare, document_starts, random_rows

from megatron_ksa.kernels.ksa_attention import reference, triton_joint, triton_summary, triton_text, workspace
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles

# An H100 has no room for float32 tiles of 64 rows at head_dim 256; the interpreter takes any.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmarks check these on a GPU")
TILES = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1))


@pytest.fixture(autouse=True)
def one_program_a_tile(monkeypatch):
    """Splitting the queries to fill a large GPU would only multiply the interpreter's work."""
    monkeypatch.setattr(workspace, "PROGRAMS", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_rows_of_two_batches_with_documents_and_a_ragged_tail(dim, dtype):
    geometry, n = KSAGeometry(8, 2, 3), 76
    rows = n + n // 8 * 2
    start = document_starts([21, 50], n, 2)
    compare(
        ("out", "dq", "dk", "dv"),
        lambda q, k, v: [triton_joint.attention(q, k, v, geometry, text_rows=n, document_start=start, tiles=TILES)],
        lambda q, k, v: [reference.attention(q, k, v, geometry, text_rows=n, document_start=start)],
        random_rows(0, 2, dim, dtype, (rows, 2), (rows, 1), (rows, 1)),
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_default_tiles_of_float32(dim):
    """Without `tiles`, as the layer calls it; the window holds every chunk, so that only summaries see summaries."""
    geometry, n = KSAGeometry(8, 1, 2**24), 43
    rows = n + n // 8
    compare(
        ("out", "dq", "dk", "dv"),
        lambda q, k, v: [triton_joint.attention(q, k, v, geometry, text_rows=n)],
        lambda q, k, v: [reference.attention(q, k, v, geometry, text_rows=n)],
        random_rows(0, 1, dim, torch.float32, (rows, 2), (rows, 2), (rows, 2)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_segment_of_a_longer_sequence(dim, dtype):
    """Queries 64 to 103; text from 40 and summaries of chunks 1 to 9, as context parallelism hands them over."""
    geometry = KSAGeometry(8, 1, 2)
    options = {"query_start": 64, "key_start": 40, "chunk_start": 1, "document_start": document_starts([70], 104, 2)}
    compare(
        ("out", "lse", "dq", "dk", "dv", "dk_summary", "dv_summary"),
        lambda *rows: triton_text.text_attention(*rows, geometry, tiles=TILES, **options),
        lambda *rows: reference.text_attention(*rows, geometry, **options),
        random_rows(0, 2, dim, dtype, (40, 2), (64, 1), (64, 1), (9, 1), (9, 1)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_summaries_of_a_segment(dim, dtype):
    """The chunks from position 40 on, in two documents."""
    geometry, chunks = KSAGeometry(8, 2, 3), 6
    options = {"document_start": document_starts([44, 60], 40 + chunks * 8, 2), "key_start": 40}
    compare(
        ("out", "dq", "dk", "dv", "dk_summary", "dv_summary"),
        lambda *rows: [triton_summary.summary_attention(*rows, geometry, **options)],
        lambda *rows: [reference.summary_attention(*rows, geometry, **options)],
        random_rows(
            0, 2, dim, dtype, (chunks * 2, 2), (chunks * 8, 1), (chunks * 8, 1), (chunks * 2, 1), (chunks * 2, 1)
        ),
    )


def test_partial_results_merge_by_log_sum_exp():
    """Text and summaries attended to apart and merged equal one pass, gradients through the log-sum-exp included."""
    geometry, n, heads = KSAGeometry(4, 1, 2), 44, 2
    rows = random_rows(0, 1, 64, torch.float32, *[(n, heads)] * 3, *[(n // 4, heads)] * 2)
    none = torch.zeros(1, 0, heads, 64)

    def merged(q, k, v, k_summary, v_summary):
        near, near_lse = triton_text.text_attention(q, k, v, none, none, geometry, tiles=TILES)
        far, far_lse = triton_text.text_attention(q, none, none, k_summary, v_summary, geometry, tiles=TILES)
        lse = torch.logaddexp(near_lse, far_lse)
        shares = [torch.exp(part - lse).transpose(1, 2)[..., None] for part in (near_lse, far_lse)]
        return shares[0] * near + shares[1] * far, lse

    compare(
        ("out", "lse", "dq", "dk", "dv", "dk_summary", "dv_summary"),
        merged,
        lambda *exact: reference.text_attention(*exact, geometry),
        rows,
    )
