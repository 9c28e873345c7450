"""From the sweeps of a record to stored tiles: which candidate wins when several lengths were swept."""

from collections import defaultdict

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks.registry import Shape
from megatron_ksa.kernels.ksa_attention.tile_store import KERNELS, Situation, StoredTile
from megatron_ksa.kernels.ksa_attention.triton_config import padded_head_dim


def _times(entries: list[dict]) -> dict[tuple[int, ...], float] | None:
    """Milliseconds of the candidates whose result agrees; None unless every candidate was tried."""
    if not entries or any("skipped" in entry for entry in entries):
        return None
    return {tuple(entry["tile"]): entry["median_ms"] for entry in entries if "median_ms" in entry}


def fastest(tables: list[dict[tuple[int, ...], float]]) -> tuple[int, ...] | None:
    """The tile with the lowest sum, over shapes, of its time relative to the best there; None if none suits all.

    Args:
        tables: milliseconds by tile, one table a shape; only a tile in every table can win.
    """
    common = set.intersection(*map(set, tables)) if tables else set()
    best = [min((table[tile] for tile in common), default=0.0) for table in tables]

    def cost(tile: tuple[int, ...]) -> tuple:
        return sum(table[tile] / least for table, least in zip(tables, best, strict=True)), tile

    return min(common, key=cost, default=None)


def winners(record: dict) -> list[StoredTile]:
    """The tiles to store of a record's sweeps: one for each kernel and situation with a shape swept to its end.

    Raises:
        UsageError: this is no record, or one without sweeps.
    """
    try:
        header = record["header"]
        gpu, capability = header["gpu"] or "cpu", header["capability"]
        swept = [(Shape(**sweep["shape"]), sweep["tiles"]) for sweep in record["sweeps"]]
        by_situation = defaultdict(list)
        for shape, entries in swept:
            situation = Situation(
                gpu, capability, shape.torch_dtype.itemsize, padded_head_dim(shape.head_dim),
                shape.heads > shape.groups, shape.chunk_size, shape.window_chunks,
            )  # fmt: skip
            for kernel in KERNELS:
                times = _times([entry for entry in entries if entry["kernel"] == kernel])
                if times is not None:
                    by_situation[kernel, situation].append((shape, times))
        versions = {name: header[name] for name in ("torch", "triton", "commit", "date")}
        if header["kernels_changed_since"]:
            versions["commit"] += " and changes"
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"no record of these benchmarks with sweeps ({error!r})") from None
    found = []
    for (kernel, situation), tables in by_situation.items():
        tile = fastest([times for _, times in tables])
        if tile is None:
            continue
        shape, _ = tables[0]
        measured = {
            "median_ms": {str(shape): round(times[tile], 4) for shape, times in tables},
            "dtype": shape.dtype, "head_dim": shape.head_dim, "batch": shape.batch,
            "summary_tokens": shape.summary_tokens, **versions,
        }  # fmt: skip
        found.append(StoredTile(kernel, situation, tile, measured))
    return found
