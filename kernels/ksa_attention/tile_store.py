"""Measured tiles on disk: one record a kernel, kind of GPU, dtype size, head dimension, sharing of K/V heads, C and W.

`python -m megatron_ksa.kernels.benchmarks --sweep ... --store` writes them (kernels/benchmarks/README.md).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

PACKAGE_STORE = Path(__file__).with_name("tiles.json")
KERNELS = ("forward", "dq", "dkv_text", "dkv_summary")


@dataclass(frozen=True)
class Situation:
    """What a kernel's fastest tile depends on.

    Attributes:
        gpu: as torch.cuda.get_device_name gives it; "cpu" for Triton's interpreter.
        capability: compute capability, as in "9.0"; "cpu" for the interpreter.
        element_bytes: of an element of Q, K and V: 2 or 4.
        head_dim: columns of a tile, `triton_config.padded_head_dim`.
        grouped: several query heads share a K/V head.
        chunk_size, window_chunks: C and W.
    """

    gpu: str
    capability: str
    element_bytes: int
    head_dim: int
    grouped: bool
    chunk_size: int
    window_chunks: int


@dataclass(frozen=True)
class StoredTile:
    """The fastest tile of a kernel in one situation.

    Attributes:
        tile: queries, keys, warps, stages, specialised (`triton_config.Tile`).
        measured: where it comes from: median milliseconds by shape, versions, commit, date.
    """

    kernel: str
    situation: Situation
    tile: tuple[int, ...]
    measured: dict = field(compare=False)


def _parsed(entry: object) -> StoredTile:
    """A record from JSON; raises ValueError saying what is wrong with it."""
    types = {known.name: known.type for known in fields(Situation)}
    names = {"kernel", *types, "tile", "measured"}
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no object")
    for problem, found in (("unknown", entry.keys() - names), ("missing", names - entry.keys())):
        if found:
            raise ValueError(f"{problem} key {', '.join(sorted(found))}")
    for name, kind in types.items():
        if type(entry[name]) is not kind:
            raise ValueError(f"{name} {entry[name]!r} is no {kind.__name__}")
    if entry["kernel"] not in KERNELS:
        raise ValueError(f"unknown kernel {entry['kernel']!r}; kernels are {', '.join(KERNELS)}")
    tile = entry["tile"]
    if not isinstance(tile, list) or len(tile) != 5 or not all(type(number) is int for number in tile):
        raise ValueError(f"tile {tile!r} is not five integers")
    powers = all(number > 0 and number.bit_count() == 1 for number in tile[:3])
    if not powers or min(tile[:2]) < 16 or tile[3] < 1 or tile[4] < 0:
        raise ValueError(f"tile {tile} is not queries, keys >= 16, warps (powers of two), stages >= 1, specialised")
    if entry["chunk_size"] < 1 or entry["window_chunks"] < 0:
        raise ValueError(f"chunk_size {entry['chunk_size']}, window_chunks {entry['window_chunks']}: not a geometry")
    measured = entry["measured"]
    if not isinstance(measured, dict) or not isinstance(measured.get("date"), str):
        raise ValueError("measured has no date")
    return StoredTile(entry["kernel"], Situation(**{name: entry[name] for name in types}), tuple(tile), measured)


def read(path: Path) -> list[StoredTile]:
    """Every record of a file.

    Raises:
        UsageError: the file cannot be read, or a record is wrong.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"stored tiles {path}: {error}") from None
    if not isinstance(entries, list):
        raise UsageError(f"stored tiles {path}: not a list of records")
    records = []
    for number, entry in enumerate(entries, start=1):
        try:
            records.append(_parsed(entry))
        except ValueError as error:
            raise UsageError(f"stored tiles {path}, record {number}: {error}") from None
    return records


def merge(path: Path, records: Iterable[StoredTile]) -> None:
    """Add records to a file, in place of those of the same kernel and situation: wholly or not at all.

    Raises:
        UsageError: the file holds something else or cannot be written, or a record is none.
    """
    stored = {(old.kernel, old.situation): old for old in (read(path) if path.exists() else [])}
    stored |= {(new.kernel, new.situation): new for new in records}
    lines = [
        json.dumps({"kernel": kept.kernel, **asdict(kept.situation), "tile": kept.tile, "measured": kept.measured})
        for kept in sorted(stored.values(), key=lambda kept: (list(asdict(kept.situation).values()), kept.kernel))
    ]
    try:
        for line in lines:
            _parsed(json.loads(line))
    except ValueError as error:
        raise UsageError(f"not stored in {path}: {error}") from None
    try:
        with whole_file(path) as stream:
            # One record a line, so that a sweep changes the lines that it measured.
            stream.write("[\n" + ",\n".join(lines) + "\n]\n")
    except OSError as error:
        raise UsageError(f"stored tiles {path}: {error}") from None


def _distance(a: Situation, b: Situation) -> float:
    """How far two geometries are apart: powers of two between their windows in tokens and between their chunk sizes."""
    chunks = abs(math.log2(a.chunk_size / b.chunk_size))
    # The window's tokens, its query's chunk included; a difference of logarithms, since W may be vast.
    tokens = [math.log2((one.window_chunks + 1) * one.chunk_size) for one in (a, b)]
    return chunks + abs(tokens[0] - tokens[1])


def choose(records: Iterable[StoredTile], kernel: str, wanted: Situation) -> StoredTile | None:
    """The record for a kernel, or None.

    Dtype size, head dimension and sharing of K/V heads must be equal. Records of the same GPU come before those of its
    compute capability; of each group the nearest (C, W) by `_distance` wins, and of equally near ones the latest.
    """

    def rank(record: StoredTile) -> tuple:
        return record.situation.gpu != wanted.gpu, _distance(record.situation, wanted)

    def fits(record: StoredTile) -> bool:
        found = record.situation
        same = (found.element_bytes, found.head_dim, found.grouped)
        return (
            record.kernel == kernel
            and same == (wanted.element_bytes, wanted.head_dim, wanted.grouped)
            and wanted.capability == found.capability
        )

    latest_first = sorted(filter(fits, records), key=lambda record: record.measured["date"], reverse=True)
    return min(latest_first, key=rank, default=None)
