"""The Triton kernels of KSA attention against the PyTorch reference, in Triton's interpreter or on a CUDA device.

tests/conftest.py chooses the interpreter where there is no GPU, before Triton is imported.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from attention_cases import compare, document_starts, random_rows
from compare import assert_close
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels import dispatch
from megatron_ksa.kernels.ksa_attention import (
    ksa_text_attention,
    reference,
    triton_joint,
    triton_summary,
    triton_text,
    workspace,
)
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles

GOLDEN = Path(__file__).parents[2] / "golden" / "ksa_attention"
INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
# Tiles far smaller than the inputs, with more queries than keys and the other way round.
TILES = Tiles(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
NAMES = ("out", "lse", "dq", "dk", "dv", "dk_summary", "dv_summary")

needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def one_program_a_tile(monkeypatch):
    """Splitting the queries to fill a large GPU would only multiply the interpreter's work."""
    monkeypatch.setattr(workspace, "PROGRAMS", 1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised floating-point memory is NaN, so that an element nobody writes is found."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(rows):
        return rows.fill_(torch.nan) if rows.is_floating_point() else rows

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: poison(empty(*sizes, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda rows, **options: poison(empty_like(rows, **options)))


def text_case(
    geometry, nq, *, heads=(2, 2), dim=16, batch=1, dtype=torch.float32, cuts=None, query_start=0, keys=None,
    chunks=None, tiles=TILES,
):  # fmt: skip
    """Compare text_attention; keys and chunks are (first, count), by default all up to the last query."""
    n = query_start + nq
    key_start, nk = keys or (0, n)
    chunk_start, nc = chunks or (0, n // geometry.chunk_size)
    ns = nc * geometry.summary_tokens
    counts = ((nq, heads[0]), (nk, heads[1]), (nk, heads[1]), (ns, heads[1]), (ns, heads[1]))
    leaves = random_rows(nq, batch, dim, dtype, *counts, device=DEVICE)
    options = {
        "document_start": None if cuts is None else document_starts(cuts, n, batch, DEVICE),
        "query_start": query_start,
        "key_start": key_start,
        "chunk_start": chunk_start,
    }
    compare(
        NAMES,
        lambda *rows: triton_text.text_attention(*rows, geometry, tiles=tiles, **options),
        lambda *rows: reference.text_attention(*rows, geometry, **options),
        leaves,
    )


@needs_kernels
@pytest.mark.parametrize(
    "geometry, nq, options",
    [
        (KSAGeometry(4, 1, 5), 131, {}),
        (KSAGeometry(4, 2, 3), 83, {"heads": (4, 2), "batch": 2}),
        (KSAGeometry(3, 3, 4), 64, {"heads": (3, 1), "dim": 24}),
        (KSAGeometry(8, 1, 0), 70, {}),
        (KSAGeometry(8, 1, 16), 100, {"heads": (2, 1)}),
        (KSAGeometry(40, 1, 1), 130, {}),
        (KSAGeometry(1, 1, 7), 50, {}),
        (KSAGeometry(4, 1, 5), 1, {}),
        (KSAGeometry(4, 1, 2**40), 40, {}),
        (KSAGeometry(4, 1, 5), 0, {"query_start": 20}),
        (KSAGeometry(4, 1, 3), 90, {"dim": 96}),
        (KSAGeometry(4, 2, 6), 90, {"dtype": torch.float16, "heads": (4, 2), "cuts": [33]}),
    ],
    ids="plain gqa-batch-S2 mqa-S3-dim24 W0 causal C40 C1 one-row vast-window no-query dim96 float16".split(),
)
def test_text_attention(geometry, nq, options):
    text_case(geometry, nq, **options)


@needs_kernels
@pytest.mark.parametrize("cuts", [[37, 38, 70], [64]], ids=str)
def test_packed_documents(cuts):
    text_case(KSAGeometry(4, 1, 4), 90, batch=2, heads=(2, 1), cuts=cuts)


@needs_kernels
@pytest.mark.parametrize(
    "query_start, nq, keys, chunks",
    [(48, 50, (28, 70), (0, 24)), (40, 33, (40, 33), (3, 2)), (57, 40, (60, 10), (2, 12)), (64, 20, (0, 8), (1, 3))],
)
@pytest.mark.parametrize("cuts", [None, [50]], ids=["one-document", "two-documents"])
def test_segments_of_a_longer_sequence(query_start, nq, keys, chunks, cuts):
    """Separate ranges of queries, text keys and summaries, with queries that see nothing among them."""
    text_case(KSAGeometry(4, 1, 4), nq, query_start=query_start, keys=keys, chunks=chunks, cuts=cuts)


@needs_kernels
@pytest.mark.parametrize("keys, chunks", [((0, 45), (0, 0)), ((0, 0), (0, 11)), ((0, 0), (0, 0))])
def test_absent_kinds_of_keys(keys, chunks):
    text_case(KSAGeometry(4, 1, 2), 45, keys=keys, chunks=chunks)


@needs_kernels
def test_parts_of_the_queries_are_summed(monkeypatch):
    """dK/dV of a tile of keys by several programs whose results are added up, some without any query."""
    monkeypatch.setattr(workspace, "PROGRAMS", 40)
    text_case(KSAGeometry(4, 1, 4), 130, heads=(2, 1), cuts=[60])


@needs_kernels
@pytest.mark.parametrize("C, S, heads, dim, cuts", [(8, 1, (2, 2), 16, None), (6, 2, (4, 2), 24, [20, 45])])
def test_summary_attention(C, S, heads, dim, cuts):
    geometry, chunks = KSAGeometry(C, S, 3), 45
    counts = ((S, heads[0]), (C, heads[1]), (C, heads[1]), (S, heads[1]), (S, heads[1]))
    counts = [(chunks * rows, count) for rows, count in counts]
    leaves = random_rows(C, 2, dim, torch.float32, *counts, device=DEVICE)
    starts = None if cuts is None else document_starts(cuts, chunks * C, 2, DEVICE)
    compare(
        ("out", *NAMES[2:]),
        lambda *rows: [triton_summary.summary_attention(*rows, geometry, document_start=starts)],
        lambda *rows: [reference.summary_attention(*rows, geometry, document_start=starts)],
        leaves,
    )


@needs_kernels
@pytest.mark.parametrize("case", range(4))
def test_golden_output_and_gradients(case):
    """Rows `[text | summaries]` in one op, against the released implementation in float64."""
    data = np.load(GOLDEN / f"case{case}.npz")
    geometry = KSAGeometry(*(int(data[key]) for key in ("chunk_size", "summary_num", "window_chunks")))
    is_text = np.arange(data["q"].shape[1]) % (geometry.chunk_size + geometry.summary_tokens) < geometry.chunk_size
    order = torch.tensor(np.concatenate([np.flatnonzero(is_text), np.flatnonzero(~is_text)]))
    q, k, v = (torch.tensor(data[key])[:, order].to(DEVICE).requires_grad_() for key in "qkv")
    tiles = Tiles(*[Tile(32, 32, 4, 1)] * 4)
    out = triton_joint.attention(q, k, v, geometry, text_rows=int(is_text.sum()), tiles=tiles)
    out.backward(torch.tensor(data["dout"])[:, order].to(DEVICE))
    for name, actual in (("out", out), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
        assert_close(name, actual.cpu(), torch.tensor(data[name])[:, order])


@needs_kernels
def test_any_strides():
    """[rows, batch, heads, dim] storage as the layer has it, and rows that the copy engine cannot address."""
    geometry = KSAGeometry(4, 1, 3)
    leaves = [t.transpose(0, 1) for t in random_rows(0, 50, 20, torch.float32, *[(2, 2)] * 3, device=DEVICE)]
    odd = [torch.nn.functional.pad(leaf, (0, 1))[..., :-1] for leaf in leaves]
    expected = triton_joint.attention(*(leaf.contiguous() for leaf in leaves), geometry, text_rows=40, tiles=TILES)
    for rows in (leaves, odd):
        out = triton_joint.attention(*rows, geometry, text_rows=40, tiles=TILES)
        assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), leaves[1])
    (wanted,) = torch.autograd.grad((expected * torch.ones_like(expected)).sum(), leaves[1])
    assert torch.equal(gradient, wanted)


@needs_kernels
def test_backward_is_deterministic():
    geometry = KSAGeometry(4, 1, 3)
    leaves = random_rows(0, 1, 16, torch.float32, (100, 4), (100, 2), (100, 2), device=DEVICE)
    gradients = [
        torch.autograd.grad(triton_joint.attention(*leaves, geometry, text_rows=80, tiles=TILES).square().sum(), leaves)
        for _ in range(2)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@needs_kernels
def test_custom_ops_obey_their_schemas():
    """Fake implementations and autograd registration, as torch.compile and recompute rely on them."""
    rows = random_rows(0, 1, 16, torch.float32, *[(16, 1)] * 3, *[(4, 1)] * 2, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.megatron_ksa
    settings = (4, 1, 2, 0, 0, 0, 0.25, TILES.pack())
    torch.library.opcheck(ops.text_attention.default, (*rows, None, *settings), test_utils=checks)
    summary = (rows[3], rows[1], rows[2], rows[3], rows[4], None, 4, 1, 0, 0.25)
    torch.library.opcheck(ops.summary_attention.default, summary, test_utils=checks)
    joint = random_rows(0, 1, 16, torch.float32, *[(20, 1)] * 3, device=DEVICE)
    settings = (None, 16, 4, 1, 2, 0.25, TILES.pack())
    torch.library.opcheck(ops.attention.default, (*joint, *settings), test_utils=checks)


@needs_kernels
def test_compiles_into_one_graph():
    geometry = KSAGeometry(4, 1, 2)
    leaves = random_rows(0, 1, 16, torch.float32, (25, 2), (25, 1), (25, 1), device=DEVICE)

    def attend(q, k, v):
        return triton_joint.attention(q, k, v, geometry, text_rows=20, tiles=TILES)

    results = []
    for run in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    "dim, heads, dtype, scale, message",
    [
        (272, (2, 2), torch.float32, None, "head_dim 272"),
        (18, (2, 2), torch.float32, None, "multiple of 4"),
        (16, (3, 2), torch.float32, None, "3 query heads"),
        (16, (2, 2), torch.float64, None, "float64"),
        (16, (2, 2), torch.float32, -1.0, "softmax scale -1.0"),
    ],
)
def test_refuses_what_it_cannot_compute(dim, heads, dtype, scale, message):
    q, k = (torch.zeros(1, 8, count, dim, dtype=dtype) for count in heads)
    none = k[:, :0]
    with pytest.raises(UsageError, match=message):
        triton_text.text_attention(q, k, k, none, none, KSAGeometry(4, 1, 2), softmax_scale=scale)


def test_dispatch_takes_the_reference_off_the_gpu_and_says_so_once(caplog):
    dispatch._announce.cache_clear()
    rows = torch.randn(1, 10, 2, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        results = [ksa_text_attention(rows, rows, rows, rows, rows, KSAGeometry(1, 1, 2)) for _ in range(2)]
    expected = reference.text_attention(rows, rows, rows, rows, rows, KSAGeometry(1, 1, 2))
    assert all(torch.equal(out, wanted) for result in results for out, wanted in zip(result, expected, strict=True))
    assert [record.message for record in caplog.records] == ["KSA attention runs in plain PyTorch (cpu, torch.float32)"]
