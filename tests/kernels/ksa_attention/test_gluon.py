"""The warp-specialised kernels, compared with the plain Triton kernels on a Hopper GPU."""

import pytest
import torch
from attention_cases import document_starts
from compare import assert_close

from megatron_ksa.kernels.ksa_attention import KSAGeometry, triton_joint, triton_text
from megatron_ksa.kernels.ksa_attention.triton_config import HALF, HOPPER

# The queries of a segment from 1024 on that see nothing before it, as context parallelism has them.
TAIL = {"query_start": 1152, "query_stop": 1536, "key_start": 1024}
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("groups", [32, 8])
@pytest.mark.parametrize("n, batch", [(1024, 16), (300, 32), (4096, 1)])
def test_short_work_items_give_the_same_bits_every_time(n, batch, groups):
    """A work item of one or two key tiles lets the producer run ahead.

    It once refilled the queries' buffer while some of a consumer's loads from it were in flight: rows of the first
    tiles came out wrong in a run of a few.
    """
    torch.manual_seed(0)
    leaves = [
        torch.randn(batch, n + n // 8, heads, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (32, groups, groups)
    ]
    d_out = torch.randn_like(leaves[0])

    def run(tiles):
        out = triton_joint.attention(*leaves, KSAGeometry(8, 1, 128), text_rows=n, tiles=tiles)
        return out, *torch.autograd.grad(out, leaves, d_out)

    plain, first = run(HALF[128]), run(HOPPER[128])
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), first, plain, strict=True):
        assert_close(name, actual, expected)
    for _ in range(20):
        assert all(torch.equal(again, once) for again, once in zip(run(HOPPER[128]), first, strict=True))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n, batch, heads, groups, dim, window, options",
    [
        (2048, 1, 4, 4, 128, 16, {}),
        (2048, 2, 8, 2, 128, 128, {}),
        (1003, 2, 4, 1, 96, 4, {}),
        (5, 1, 2, 2, 128, 1, {}),
        (1000, 1, 4, 2, 128, 4, {"document_start": (300, 701)}),
        (2048, 1, 4, 4, 128, 16, {"query_start": 1024}),
        (2048, 1, 4, 4, 128, 1000, {"no_summaries": True}),
        (2048, 2, 8, 2, 128, 16, {"no_summaries": True, "document_start": (300, 1701)}),
        (1003, 1, 4, 4, 96, 4, {"no_summaries": True, "query_start": 512}),
        (2048, 1, 4, 4, 128, 16, {"query_start": 1024, "query_stop": 1152, "key_start": 896}),
        (2048, 2, 8, 2, 128, 16, {**TAIL, "document_start": (1100,)}),
        (2048, 1, 4, 4, 128, 16, {**TAIL, "no_summaries": True}),
    ],
)
def test_specialised_kernels_equal_the_plain_ones(n, batch, heads, groups, dim, window, options, dtype):
    torch.manual_seed(0)
    geometry, summaries = KSAGeometry(8, 1, window), 0 if options.get("no_summaries") else n // 8
    places = {name: options.get(name, 0) for name in ("query_start", "key_start")}
    queries, keys = (options.get("query_stop", n) - start for start in places.values())
    counts = ((queries, heads), (keys, groups), (keys, groups), (summaries, groups), (summaries, groups))
    rows = [torch.randn(batch, r, h, dim, device="cuda", dtype=dtype).requires_grad_() for r, h in counts]
    start = document_starts(options["document_start"], n, device="cuda") if "document_start" in options else None
    found = []
    for tiles in (HOPPER[128], HALF[128]):
        out, lse = triton_text.text_attention(*rows, geometry, document_start=start, tiles=tiles, **places)
        gradients = torch.autograd.grad((out, lse), rows, (torch.ones_like(out), torch.ones_like(lse)))
        found.append((out, lse, *gradients))
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv", "dks", "dvs"), *found, strict=True):
        assert torch.isfinite(actual).all(), name
        assert_close(name, actual, expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n, batch, heads, groups, dim, sizes, firsts",
    [
        (2048, 1, 4, 4, 128, (8, 1, 16), ()),
        (2048, 2, 8, 2, 128, (8, 1, 128), ()),
        (1003, 2, 4, 1, 96, (8, 2, 4), ()),
        (12, 1, 2, 2, 128, (8, 1, 1), ()),
        (1001, 1, 4, 2, 128, (8, 1, 4), (300, 701)),
        (1500, 1, 4, 4, 128, (6, 4, 3), (77, 901)),
        (640, 1, 4, 2, 128, (4, 8, 2), (333,)),
        (5, 1, 2, 2, 128, (8, 1, 1), ()),
    ],
)
def test_summary_queries_equal_the_kernel_for_them(n, batch, heads, groups, dim, sizes, firsts, dtype):
    torch.manual_seed(0)
    rows = n + n // sizes[0] * sizes[1]
    leaves = [
        torch.randn(batch, rows, count, dim, device="cuda", dtype=dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    start, d_out = document_starts(firsts, n, device="cuda") if firsts else None, torch.randn_like(leaves[0])
    found = []
    for tiles in (HOPPER[128], HALF[128]):
        out = triton_joint.attention(*leaves, KSAGeometry(*sizes), text_rows=n, document_start=start, tiles=tiles)
        found.append((out, *torch.autograd.grad(out, leaves, d_out)))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert torch.isfinite(actual).all(), name
        for kind, part in (("text", slice(n)), ("summaries", slice(n, None))):
            if actual[:, part].numel():
                assert_close(f"{name} of {kind}", actual[:, part], expected[:, part])
