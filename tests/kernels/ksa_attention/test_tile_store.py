"""Stored tiles: which record a call takes, merging, and files that are no store."""

import json
import os
from dataclasses import replace

import pytest
import torch

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks.candidates import candidates
from megatron_ksa.kernels.ksa_attention import KSAGeometry, tile_store, triton_config, triton_joint
from megatron_ksa.kernels.ksa_attention.tile_store import PACKAGE_STORE, Situation, StoredTile, choose, merge, read
from megatron_ksa.kernels.ksa_attention.triton_config import HALF, SINGLE, Tile, Tiles, tile_numbers, tiles_for

H100 = Situation("NVIDIA H100", "9.0", 2, 128, False, 8, 128)
TILE = (64, 128, 4, 2, 1)
H100_SHARED = 227 * 1024


def stored(tile=TILE, kernel="forward", date="2026-01-01", **situation) -> StoredTile:
    return StoredTile(kernel, replace(H100, **situation), tile, {"date": date})


def test_kernels_are_those_with_tiles():
    assert list(Tiles._fields) == list(tile_store.KERNELS)
    assert len(TILE) == len(Tile._fields)


def test_stored_tiles_are_candidates_that_fit():
    """Each kernel and situation has one record, of a GPU, with a tile that a sweep tries there."""
    records = read(PACKAGE_STORE)
    assert records and len({(record.kernel, record.situation) for record in records}) == len(records)
    for record in records:
        found = record.situation
        hopper = found.capability.startswith("9.")
        tried = candidates(record.kernel, found.head_dim, found.element_bytes, H100_SHARED, hopper)
        assert found.gpu != "cpu" and record.tile in tried
        assert record.measured["median_ms"] and record.measured["commit"]


@pytest.mark.parametrize(
    "others",
    [
        {"gpu": "NVIDIA A100", "capability": "8.0"},
        {"element_bytes": 4},
        {"head_dim": 64},
        {"grouped": True},
        {"kernel": "dq"},
    ],
    ids=lambda others: "-".join(others),
)
def test_records_of_another_situation_are_not_taken(others):
    assert choose([stored(**others)], "forward", H100) is None
    assert choose([stored(**others), stored()], "forward", H100) == stored()


def test_the_gpu_comes_before_its_capability_and_then_the_nearest_geometry():
    near = stored(gpu="NVIDIA H200")
    far = stored(window_chunks=2, chunk_size=64)
    assert choose([near, far], "forward", H100) == far
    assert choose([near], "forward", H100) == near
    assert choose([near], "forward", replace(H100, gpu="NVIDIA GH200")) == near


@pytest.mark.parametrize(
    "chunk_size, window_chunks, nearest",
    [
        (8, 128, (8, 128)),
        (8, 2**40, (8, 1024)),
        (8, 0, (8, 128)),
        (16, 64, (16, 64)),
        # Between windows of 1032 and of 8200 tokens: by ratio, 2408 is nearer to the first and 3208 to the second.
        (8, 300, (8, 128)),
        (8, 400, (8, 1024)),
        (15, 68, (16, 64)),
    ],
)
def test_nearest_geometry(chunk_size, window_chunks, nearest):
    records = [
        stored(chunk_size=C, window_chunks=W, date=f"2026-01-0{day}")
        for day, (C, W) in enumerate([(16, 64), (8, 1024), (8, 128)], start=1)
    ]
    for order in (records, records[::-1]):
        found = choose(order, "forward", replace(H100, chunk_size=chunk_size, window_chunks=window_chunks))
        assert (found.situation.chunk_size, found.situation.window_chunks) == nearest


def test_of_equally_near_records_the_latest_is_taken():
    old = stored(gpu="NVIDIA H200", date="2026-01-01")
    new = stored(gpu="NVIDIA GH200", date="2026-02-01")
    for records in ([old, new], [new, old]):
        assert choose(records, "forward", H100) == new


@pytest.fixture
def package_store(tmp_path, monkeypatch):
    """A store of this test in place of the package's."""
    path = tmp_path / "tiles.json"
    merge(path, [])
    caches = (triton_config._package_store, triton_config._look_up)
    monkeypatch.setattr(triton_config, "PACKAGE_STORE", path)
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


def queries(head_dim, dtype=torch.bfloat16, heads=4):
    return torch.zeros(1, 8, heads, head_dim, dtype=dtype)


CPU = {"gpu": "cpu", "capability": "cpu"}
GEOMETRY = KSAGeometry(8, 1, 128)


def test_defaults_where_nothing_is_stored(package_store):
    assert tiles_for(queries(128), 4, GEOMETRY) == HALF[128]
    assert tiles_for(queries(96), 4, GEOMETRY) == HALF[128]
    assert tiles_for(queries(16, torch.float32), 4, GEOMETRY) == SINGLE[64]


def test_a_stored_kernel_takes_its_tile_and_the_others_their_defaults(package_store):
    merge(package_store, [stored((32, 32, 4, 2, 0), "dq", **CPU), stored((16, 16, 4, 1, 0), "dq", grouped=True, **CPU)])
    wanted = HALF[128]._replace(dq=Tile(32, 32, 4, 2))
    assert tiles_for(queries(96, torch.float16), 4, KSAGeometry(16, 2, 77)) == wanted
    assert tiles_for(queries(128), 2, GEOMETRY).dq == Tile(16, 16, 4, 1)
    assert tiles_for(queries(64), 4, GEOMETRY) == HALF[64]


def test_the_file_is_read_once(package_store):
    first = tile_numbers(queries(128), 4, GEOMETRY)
    package_store.unlink()
    assert tile_numbers(queries(128), 4, GEOMETRY) is first
    tiles_for(queries(128), 4, KSAGeometry(8, 1, 1024))


def test_the_look_up_is_a_constant_of_a_compiled_graph(package_store):
    """torch.compile looked through the cache and traced what was below it, which now reads a file."""
    merge(package_store, [stored((16, 32, 4, 1, 0), element_bytes=4, head_dim=16, **CPU)])

    @torch.compile(backend="eager", fullgraph=True)
    def numbers(q):
        return q.sum() + tile_numbers(q, 4, GEOMETRY)[1]

    assert numbers(queries(16, torch.float32)).item() == 32


def test_pack_and_unpack():
    assert Tiles.unpack(HALF[128].pack()) == HALF[128]


def test_merging_replaces_what_it_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    merge(path, [stored(), stored(kernel="dq"), stored(head_dim=64)])
    merge(path, [stored((64, 64, 4, 3, 1), date="2026-03-01"), stored(chunk_size=16)])
    kept = read(path)
    assert len(kept) == 4
    (replaced,) = (one for one in kept if one.kernel == "forward" and one.situation == H100)
    assert replaced.tile == (64, 64, 4, 3, 1) and replaced.measured == {"date": "2026-03-01"}
    text = path.read_text()
    merge(path, [])
    assert path.read_text() == text and len(text.splitlines()) == 6
    assert [entry.name for entry in path.parent.iterdir()] == ["tiles.json"]


def test_a_merge_that_is_cut_short_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    merge(path, [stored()])
    before = path.read_text()

    def full(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="tiles.json: No space left"):
        merge(path, [stored(head_dim=64)])
    assert path.read_text() == before


def written(tmp_path, **changes):
    """A store of one record with some of its entries changed; None removes one."""
    path = tmp_path / "tiles.json"
    merge(path, [stored()])
    (entry,) = json.loads(path.read_text())
    entry = {key: value for key, value in (entry | changes).items() if value is not None}
    path.write_text(json.dumps([entry]))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": "red"}, "record 1: unknown key colour"),
        ({"head_dim": None}, "record 1: missing key head_dim"),
        ({"head_dim": "128"}, "head_dim '128' is no int"),
        ({"grouped": 1}, "grouped 1 is no bool"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"kernel": "dkv"}, "unknown kernel 'dkv'; kernels are forward, dq, dkv_text, dkv_summary"),
        ({"tile": [64, 128, 4, 2]}, "not five integers"),
        ({"tile": [64, 100, 4, 2, 1]}, "powers of two"),
        ({"tile": [64, 128, 4, 0, 1]}, "stages >= 1"),
        ({"measured": {}}, "measured has no date"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(UsageError, match="tiles.json, " + ".*" + message.replace("(", r"\(")):
        read(path)
    with pytest.raises(UsageError, match="tiles.json, record 1"):
        merge(path, [stored()])


@pytest.mark.parametrize("text, message", [('[{"kernel":', "Expecting value"), ("{}", "not a list of records")])
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(UsageError, match=f"tiles.json: .*{message}"):
        read(tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == text


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="absent.json"):
        read(tmp_path / "absent.json")


def test_attention_with_stored_tiles_equals_attention_with_given_ones(package_store):
    """In the interpreter; on a GPU other tests take the defaults."""
    if torch.cuda.is_available():
        pytest.skip("records of the CPU are not looked up on a GPU")
    small = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1))
    merge(
        package_store,
        [stored(tile, kernel, element_bytes=4, head_dim=16, **CPU) for kernel, tile in small._asdict().items()],
    )
    rows = torch.randn(1, 45, 2, 16, generator=torch.Generator().manual_seed(0))
    geometry = KSAGeometry(4, 1, 3)
    assert tiles_for(rows, 2, geometry) == small

    def attend(q, tiles=None):
        return triton_joint.attention(q, rows, rows, geometry, text_rows=36, tiles=tiles)

    out = attend(rows)
    assert torch.equal(out, attend(rows, small))
    assert torch.equal(out, torch.compile(attend, backend="aot_eager", fullgraph=True)(rows))
