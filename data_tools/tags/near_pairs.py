"""Candidate pairs of near-duplicates from band keys: in memory for one band, on disk for many.

Items are numbered in order of preference, so that of a pair the lower number stays. Items that share a band's key are
a group. Every pair of a group of up to `STARS` + 1 items is a candidate; in a larger one an item is paired with the
`STARS` best of the group and with the `NEIGHBOURS` before it, so that candidates grow with the items, not with their
square.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.engine import Engine

STARS, NEIGHBOURS = 8, 2
PAIRS_PER_SHARD = 20_000


def packed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pairs as uint64 that sort by the item that would go, then by the one that would stay."""
    low, high = np.minimum(one, other), np.maximum(one, other)
    return high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)


def unpacked(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [pairs] twice: the item that would go, the item that would stay."""
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def band_pairs(keys: np.ndarray, items: np.ndarray | None = None) -> np.ndarray:
    """Candidates of one band: uint64 [pairs], packed, sorted, each once.

    Args:
        keys: uint64 [items], in order of the items' numbers.
        items: int64 [items], their numbers, rising; 0, 1, ... by default.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(keys) else np.empty(0, bool)
    starts = np.flatnonzero(new)
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    # Most items are alone: go on with the others.
    joined = np.repeat(sizes > 1, sizes)
    places = np.flatnonzero(joined)
    start = np.repeat(starts, sizes)[places]
    partners = [start + star for star in range(STARS)] + [places - back for back in range(1, NEIGHBOURS + 1)]
    found = []
    for partner in partners:
        true = (partner < places) & (partner >= start)
        found.append(packed(order[places[true]], order[partner[true]]))
    pairs = np.unique(np.concatenate(found))
    if items is None:
        return pairs
    gone, stays = unpacked(pairs)
    return packed(items[gone], items[stays])


def memory_pairs(keys: Iterable[np.ndarray]) -> np.ndarray:
    """Candidates of all bands, uint64 [bands, items]: uint64 [pairs], packed, sorted, each once."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *map(band_pairs, keys)]))


class BandFiles:
    """Band keys and candidates on disk, a file a band.

    Args:
        folder: of its own.
        bands: how many.
    """

    def __init__(self, folder: Path, bands: int) -> None:
        self.folder, self.bands = folder, bands
        self._streams = [open(self._keys(band), "wb") for band in range(bands)]  # noqa: SIM115

    def _keys(self, band: int) -> Path:
        return self.folder / f"keys-{band}.u64"

    def _pairs(self, band: int) -> Path:
        return self.folder / f"pairs-{band}.u64"

    def write(self, keys: np.ndarray) -> None:
        """Add the keys of some texts, uint64 [bands, texts], in order of the texts."""
        for stream, row in zip(self._streams, keys, strict=True):
            stream.write(row.tobytes())

    def close(self) -> None:
        """End writing."""
        for stream in self._streams:
            stream.close()

    def find_pairs(self, text_of_item: Path, engine: Engine) -> Iterator[int]:
        """Candidates of every band, one task a band; yields how many.

        Args:
            text_of_item: file of int64 [items], the text of each item that is compared, in order of preference; -1 for
                an item that is not compared.
        """
        tasks = [(self._keys(band), self._pairs(band)) for band in range(self.bands)]
        return engine.map(partial(_write_pairs, text_of_item=text_of_item), tasks)

    def shards(self, items: int, total: int) -> list[tuple[int, int]]:
        """Ranges of items, by the one that would go, with about `PAIRS_PER_SHARD` candidates each.

        Args:
            total: candidates of all bands.
        """
        parts = max(1, -(-total // PAIRS_PER_SHARD))
        edges = np.linspace(0, items, parts + 1).astype(np.int64)
        return [(int(first), int(last)) for first, last in zip(edges[:-1], edges[1:], strict=True) if last > first]

    def shard_pairs(self, first: int, last: int) -> np.ndarray:
        """Candidates whose item that would go is in [first, last): uint64 [pairs], sorted, each once."""
        found = [np.empty(0, np.uint64)]
        for band in range(self.bands):
            pairs = mapped(self._pairs(band), np.uint64)
            low, high = np.searchsorted(pairs, np.array([first, last], np.uint64) << np.uint64(32))
            found.append(np.array(pairs[low:high]))
        return np.unique(np.concatenate(found))


def mapped(path: Path, dtype: type) -> np.ndarray:
    """An array file without a header, read as it is used; an empty file is an empty array."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _write_pairs(task: tuple[Path, Path], text_of_item: Path) -> int:
    keys, pairs = task
    text = np.fromfile(text_of_item, np.int64)
    items = np.flatnonzero(text >= 0)
    found = band_pairs(np.fromfile(keys, np.uint64)[text[items]], items)
    found.tofile(pairs)
    return len(found)
