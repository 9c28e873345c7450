"""Attention of a decoding step: the reference against KSA's definition, the Triton kernels against the reference."""

import math

import pytest
import torch
import triton
from compare import assert_close
from triton.language import standard

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.ksa_attention import KSAGeometry
from megatron_ksa.kernels.ksa_attention import reference as full
from megatron_ksa.kernels.ksa_decode import CacheGeometry, reference, triton_decode
from megatron_ksa.kernels.ksa_decode.triton_decode import DecodeTile

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
not_interpreted = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter's products take bfloat16 for integers"),
]
# Chunk size, S, W, length: C, S and W small; a window of the running chunk alone; summaries longer than chunks.
GEOMETRIES = [(4, 1, 2, 41), (3, 2, 0, 31), (2, 3, 1, 24), (1, 1, 3, 20), (8, 1, 1, 60)]
# Rings with room for so many chunks more than the window.
ROOMS = [(*GEOMETRIES[0], 3), (*GEOMETRIES[1], 1), (*GEOMETRIES[2], 20), (*GEOMETRIES[4], 2)]


def geometry_of(chunk_size, summary_tokens, window, length, room=0):
    ring, summaries = (window + 1 + room) * chunk_size, length // chunk_size * summary_tokens
    return CacheGeometry(chunk_size, summary_tokens, ring, summaries, window if room else None)


def rows(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("settings", [*GEOMETRIES, *ROOMS])
def test_token_by_token_equals_the_whole_sequence(settings):
    """Text and summaries, at every position, against KSA of all rows at once in float64."""
    chunk_size, summary_tokens, window, length, *_ = settings
    chunks = length // chunk_size
    total = length + chunks * summary_tokens
    q, k, v = (rows(1, total, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    expected = full.attention(q, k, v, KSAGeometry(chunk_size, summary_tokens, window), text_rows=length)
    geometry = geometry_of(*settings)
    caches = [torch.full((3, 2, geometry.rows, 8), math.nan, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([1], device=DEVICE)
    for position in range(length):
        completes = (position + 1) % chunk_size == 0
        own = [length + position // chunk_size * summary_tokens + s for s in range(summary_tokens)] if completes else []
        index = [position, *own]
        step = [part[0, index, None] for part in (q, k, v)]
        out = reference.decode_attention(*step, *caches, slots, torch.tensor([position], device=DEVICE), geometry)
        assert_close(f"position {position}", out[:, 0], expected[0, index])
    assert all(cache[[0, 2]].isnan().all() for cache in caches)


def step_case(geometry, starts, heads=(4, 2), dim=16, with_summaries=True, dtype=torch.float32, slots=None):
    """A step of sequences of these lengths, and a cache whose rows are NaN but for those that each has written."""
    batch, (queries, groups) = len(starts), heads
    count = 1 + geometry.summary_tokens if with_summaries else 1
    q, k, v = (rows(count, batch, h, dim, seed=i, dtype=dtype) for i, h in enumerate((queries, groups, groups)))
    order = list(range(batch))[::-1] if slots is None else slots
    caches = []
    for seed in (7, 8):
        cache = rows(batch + 1, groups, geometry.rows, dim, seed=seed, dtype=dtype)
        for slot, start in zip(order, starts, strict=True):
            cache[slot, :, min(start, geometry.ring) : geometry.ring] = math.nan
            kept = start // geometry.chunk_size * geometry.summary_tokens
            cache[slot, :, geometry.ring + kept :] = math.nan
        caches.append(cache)
    return q, k, v, *caches, torch.tensor(order, device=DEVICE), torch.tensor(starts, device=DEVICE), geometry


def compare(case, **options):
    """Output and caches of the kernels against those of the reference in float64."""
    q, k, v, key, value, *places = case
    got_caches, caches = [[key.clone(), value.clone()], [key.double(), value.double()]]
    got = triton_decode.decode_attention(q, k, v, *got_caches, *places, **options)
    expected = reference.decode_attention(q.double(), k.double(), v.double(), *caches, *places)
    assert_close("out", got, expected)
    for name, actual, wanted in zip(("key", "value"), got_caches, caches, strict=True):
        assert torch.equal(actual.double().nan_to_num(9.0), wanted.nan_to_num(9.0)), name


@needs_kernels
@pytest.mark.parametrize(("settings", "parts"), zip([*GEOMETRIES, *ROOMS], (1, 3, 3, 2, 1, 2, 1, 3, 1), strict=True))
def test_kernels_equal_the_reference(settings, parts):
    """Ragged lengths, from no token to the longest, in slots of another order; chunks that complete and that do not."""
    geometry, length = geometry_of(*settings), settings[3]
    window = (geometry.window_chunks + 1) * geometry.chunk_size
    near = {edge + step for edge in (window, geometry.ring) for step in (-1, 0, 1)}
    starts = sorted(start for start in {0, *near, length - 2, length - 1} if start < length)
    compare(step_case(geometry, starts), tile=DecodeTile(16, 4, 2, 1), parts=parts)


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"heads": (3, 3), "dim": 24},
        {"heads": (5, 1)},
        {"heads": (34, 2), "dim": 8},
        {"with_summaries": False},
        {"dtype": torch.float16, "heads": (4, 4)},
        pytest.param({"dtype": torch.bfloat16, "heads": (32, 8), "dim": 128}, marks=not_interpreted),
    ],
    ids="mha-dim24 mqa 17-queries-a-group no-summaries float16 bfloat16".split(),
)
def test_kinds_of_heads(options):
    compare(step_case(geometry_of(4, 2, 2, 60), [59, 11, 30], **options), parts=2)


@needs_kernels
@pytest.mark.parametrize("parts", [1, 4])
def test_full_and_window_layers(parts):
    """A ring that never turns is causal attention; without summary rows what is older than the window is unseen."""
    for geometry in (CacheGeometry(1, 0, 50, 0), CacheGeometry(4, 0, 12, 0)):
        compare(step_case(geometry, [0, 49, 20, 11], with_summaries=False), tile=DecodeTile(16, 4, 2, 1), parts=parts)


@needs_kernels
def test_one_length_of_all_sequences():
    """Expanded to the batch it is one number in memory: the kernels read the lengths of the others behind it."""
    *case, starts, geometry = step_case(geometry_of(4, 1, 2, 60), [30, 30, 30])
    assert starts.tolist() == [30, 30, 30]
    # What lies behind the number is no length of these sequences.
    starts = torch.tensor([30, 3, 3], device=DEVICE)[:1].expand(3)
    compare((*case, starts, geometry), parts=2)


@needs_kernels
def test_a_slot_at_its_longest_length_writes_no_other_row():
    """Its next chunk has no summary rows: they would be the first rows of the next K/V head."""
    geometry = geometry_of(4, 1, 1, 19)
    compare(step_case(geometry, [19, 7]))


@needs_kernels
def test_a_sequence_does_not_depend_on_the_others():
    """To the last bit; so the text of a seed does not depend on the batch."""
    geometry = geometry_of(4, 1, 2, 60)
    case = step_case(geometry, [59, 11, 30, 0])
    together = triton_decode.decode_attention(*case, parts=3)
    for b in range(4):
        q, k, v, key, value, slots, starts, _ = case
        alone = triton_decode.decode_attention(
            q[:, b : b + 1], k[:, b : b + 1], v[:, b : b + 1], key, value, slots[b : b + 1], starts[b : b + 1],
            geometry, parts=3,
        )  # fmt: skip
        assert torch.equal(alone[:, 0], together[:, b])


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, kc, vc: (q.double(), k, v, kc, vc), "float64"),
        (lambda q, k, v, kc, vc: (q, k, v, kc[:, :, 1:], vc), "a cache .* is needed"),
        (lambda q, k, v, kc, vc: (q[:, :, :3], k, v, kc, vc), "3 query heads do not divide into 2"),
    ],
)
def test_refuses_what_it_cannot_compute(change, message):
    *tensors, slots, starts, geometry = step_case(geometry_of(4, 1, 2, 60), [5])
    with pytest.raises(UsageError, match=message):
        triton_decode.decode_attention(*change(*tensors), slots, starts, geometry)
