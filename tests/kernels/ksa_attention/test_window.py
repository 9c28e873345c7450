"""The window without summaries in the kernels of KSA (layers of kind `w`), in the interpreter or on a CUDA device."""

import pytest
import torch
import triton
from attention_cases import compare, document_starts, random_rows
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.ksa_attention import (
    KSAGeometry,
    reference,
    triton_joint,
    triton_text,
    triton_text_backward,
    workspace,
)
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
TILES = Tiles(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
NAMES = ("out", "dq", "dk", "dv")
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def one_program_a_tile(monkeypatch):
    """Splitting the queries to fill a large GPU would only multiply the interpreter's work."""
    monkeypatch.setattr(workspace, "PROGRAMS", 1)


def dense_window(q, k, v, geometry, start):
    """The window's definition under a mask of all pairs, [B, n, Hq, D], in the dtype of q."""
    n, chunk = q.shape[1], torch.arange(q.shape[1], device=q.device) // geometry.chunk_size
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)[None, :]
    visible = (j <= i) & (chunk[:, None] - chunk[None, :] <= geometry.window_chunks)
    visible = visible[None] if start is None else visible[None] & (j >= start[:, :, None])
    k, v = (rows.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for rows in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), v)


CASES = {
    "mha": ((2, 2), 1, None, torch.float32),
    "gqa-documents": ((4, 2), 2, [21, 22, 30], torch.float32),
    "mqa-float16": ((3, 1), 1, [40], torch.float16),
}


@pytest.mark.parametrize("summary_tokens", [0, 2])
@pytest.mark.parametrize("heads, batch, cuts, dtype", CASES.values(), ids=CASES)
def test_rows_of_text_alone(heads, batch, cuts, dtype, summary_tokens):
    """Whatever the geometry says of summaries, a call without summary rows is the window alone."""
    n, geometry = 45, KSAGeometry(4, summary_tokens, 3)
    start = None if cuts is None else document_starts(cuts, n, batch, DEVICE)
    leaves = random_rows(0, batch, 16, dtype, (n, heads[0]), (n, heads[1]), (n, heads[1]), device=DEVICE)
    options = {"text_rows": n, "document_start": start}

    def dense(*rows):
        return [dense_window(*rows, geometry, start)]

    compare(NAMES, lambda *rows: [triton_joint.attention(*rows, geometry, tiles=TILES, **options)], dense, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    compare(NAMES, lambda *rows: [reference.attention(*rows, geometry, **options)], dense, exact)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_segment_and_its_halo(window):
    """As context parallelism has it: a rank's own text, then the halo before it, merged by their log-sum-exps."""
    n, first, geometry = 72, 40, KSAGeometry(4, 0, window)
    halo = max(first - window * geometry.chunk_size, 0)
    start = document_starts([50], n, 1, DEVICE)
    leaves = random_rows(1, 1, 16, torch.float32, (n - first, 4), (n - halo, 2), (n - halo, 2), device=DEVICE)

    def merged(attend):
        def run(q, k, v):
            none, own = k[:, :0], first - halo
            options = {"document_start": start, "query_start": first}
            near, near_lse = attend(q, k[:, own:], v[:, own:], none, none, geometry, key_start=first, **options)
            far, far_lse = attend(q, k[:, :own], v[:, :own], none, none, geometry, key_start=halo, **options)
            lse = torch.logaddexp(near_lse, far_lse)
            shares = [torch.exp(part - lse).transpose(1, 2)[..., None] for part in (near_lse, far_lse)]
            return shares[0] * near + shares[1] * far, lse

        return run

    def whole(q, k, v):
        none = k[:, :0]
        options = {"document_start": start, "query_start": first, "key_start": halo}
        return reference.text_attention(q, k, v, none, none, geometry, **options)

    names = ("out", "lse", *NAMES[1:])
    # Where the halo shows nothing to a query, log-sum-exps of -inf merge; the kernels' gradients must stay finite.
    compare(
        names, merged(lambda *rows, **options: triton_text.text_attention(*rows, tiles=TILES, **options)), whole, leaves
    )


def test_nothing_is_launched_for_absent_summaries(monkeypatch):
    """The window costs none of the summaries' work: no kernel, and no call that fills empty gradients."""
    launched = []
    monkeypatch.setattr(triton_text_backward, "_launch_plain_dkv", lambda *given: launched.append(given[8]))
    monkeypatch.setattr(triton_text_backward, "call", lambda *given: launched.append(given[0]))
    leaves = random_rows(0, 1, 16, torch.float32, *[(24, 2)] * 3, device=DEVICE)
    out = triton_joint.attention(*leaves, KSAGeometry(4, 0, 2), text_rows=24, tiles=TILES)
    out.sum().backward()
    assert launched == [True]


def test_summary_rows_of_a_geometry_without_summaries_are_refused():
    q, k = (rows.detach() for rows in random_rows(0, 1, 16, torch.float32, (8, 2), (8, 2), device=DEVICE))
    with pytest.raises(UsageError, match="2 summary rows: a geometry with summary_tokens 0 has none"):
        triton_text.text_attention(q, k, k, k[:, :2], k[:, :2], KSAGeometry(4, 0, 1))
    with pytest.raises(UsageError, match="2 summary rows"):
        triton_joint.attention(q, k, k, KSAGeometry(4, 0, 1), text_rows=6)
