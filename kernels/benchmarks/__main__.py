"""Benchmarks of the kernels on one device: checks, times, memory, a JSON record and a chart (see README.md here)."""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.kernels.ksa_attention.tile_store import PACKAGE_STORE, merge, read

RECORD, CHART = "kernels.json", "attention_time.png"
# Characters of a record: ours have some hundred thousand.
MAX_RECORD = 100_000_000


def _heads(text: str) -> tuple[int, int]:
    """32/8 -> (32, 8): query heads and K/V heads."""
    try:
        heads, groups = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not QUERY/KV, as in 32/8") from None
    if groups < 1 or heads < 1 or heads % groups:
        raise argparse.ArgumentTypeError(f"{text!r}: query heads must be a multiple of K/V heads")
    return heads, groups


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m megatron_ksa.kernels.benchmarks", description=__doc__)
    options.add_argument("--out", type=Path, help=f"folder for {RECORD} and {CHART}")
    options.add_argument("--op", nargs="+", help="ops to run; all by default")
    options.add_argument("--list", action="store_true", help="list the ops and stop")
    options.add_argument("--draw", type=Path, metavar="JSON", help="draw the chart of a record into --out and stop")
    options.add_argument("--no-chart", action="store_true", help="write the record only")
    options.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], help="text tokens")
    options.add_argument(
        "--heads", type=_heads, nargs="+", default=[(32, 32), (32, 8)], help="query/KV heads; the chart shows the first"
    )
    options.add_argument("--head-dim", type=_positive, default=128)
    options.add_argument("--batch", type=_positive, default=1)
    options.add_argument("--chunk-size", type=_positive, default=8, help="C, text tokens in a chunk")
    options.add_argument("--summary-tokens", type=_positive, default=1, help="S, summaries after each chunk")
    options.add_argument("--window-chunks", type=int, default=128, help="W, past chunks seen as text")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument(
        "--without-features", action="store_true",
        help="do not check documents, segments, other head dimensions and dtypes, which take KSA minutes to compile; "
        "the tests check them too",
    )  # fmt: skip
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs Triton's interpreter")
    options.add_argument("--limit", type=float, default=330.0, help="seconds after which nothing new is started")
    options.add_argument("--sweep", type=_positive, nargs="+", default=[], help="also time candidate tiles at lengths")
    options.add_argument(
        "--store", type=Path, nargs="?", const=PACKAGE_STORE, metavar="FILE",
        help=f"merge the fastest tiles of --sweep, or of --merge, into FILE (this package's {PACKAGE_STORE.name})",
    )  # fmt: skip
    options.add_argument("--merge", type=Path, metavar="JSON", help="take the sweeps of a record for --store and stop")
    options.add_argument("--commit", help="commit of the code, where it is no git checkout")
    return options


def main() -> None:
    """Run what the command line asks for."""
    options = parser().parse_args()
    with usage_errors_exit():
        if options.draw is not None:
            return _draw(options)
        if options.merge is not None:
            return _merge(options)
        if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            # Triton chooses between compiler and interpreter when it is first imported, which torch has done.
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        _run(options)


def _out(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise UsageError(f"--out is missing: give the folder for {RECORD} and {CHART}")
    return options.out


def _draw(options: argparse.Namespace) -> None:
    from megatron_ksa.kernels.benchmarks.chart import draw

    out = _out(options)
    record = _record("--draw", options.draw)
    draw(record, out / CHART)
    print(f"wrote {out / CHART}")


def _record(flag: str, path: Path) -> dict:
    """A record of an earlier run."""
    try:
        with open(path, encoding="utf-8") as stream:
            record = json.loads(stream.read(MAX_RECORD))
        record["results"], record["header"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{flag} {path}: no record of this program ({error!r})") from None
    return record


def _merge(options: argparse.Namespace) -> None:
    if options.store is None:
        raise UsageError(f"--merge {options.merge}: give --store too, for the tiles to go to")
    _store(_record("--merge", options.merge), options.store)


def _store(record: dict, store: Path) -> None:
    from megatron_ksa.kernels.benchmarks.store import winners

    if record["header"]["gpu"] is None and store.resolve() == PACKAGE_STORE.resolve():
        raise UsageError(f"--store {store}: times of the interpreter do not belong there; give another file")
    found = winners(record)
    if found:
        merge(store, found)
    for tile in found:
        print(f"stored {tile.kernel} {tile.tile}: {tile.situation}")
    print(f"merged {len(found)} tiles into {store}" if found else "no kernel was swept to its end: nothing is stored")


def _run(options: argparse.Namespace) -> None:
    import torch

    from megatron_ksa.kernels.benchmarks import runner
    from megatron_ksa.kernels.benchmarks.chart import draw
    from megatron_ksa.kernels.benchmarks.registry import Shape

    if options.list:
        for op in runner.OPS.values():
            print(f"{op.name:28} {op.what}")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device: run on a GPU, or try tiny shapes with --device cpu")
    if options.window_chunks < 0:
        raise UsageError(f"--window-chunks {options.window_chunks}: at least 0 is needed")
    out = _out(options)
    if options.store is not None:
        if not options.sweep:
            raise UsageError("--store takes the fastest tiles of a sweep: give its lengths with --sweep")
        if options.device == "cpu" and options.store == PACKAGE_STORE:
            raise UsageError("--store: times of the interpreter do not belong in the package's tiles; give a FILE")
        if options.store.exists():
            # A file that cannot be merged into is found before the sweep, not after it.
            read(options.store)

    def shapes(lengths: list[int]) -> tuple[Shape, ...]:
        sizes = (options.head_dim, options.batch, options.chunk_size, options.summary_tokens, options.window_chunks)
        return tuple(Shape(n, *heads, *sizes, options.dtype) for heads in options.heads for n in lengths)

    ops = tuple(options.op or runner.OPS)
    plan = runner.Plan(
        ops, shapes(options.lengths), options.device, out / RECORD, shapes(options.sweep), options.limit,
        options.commit, not options.without_features,
    )  # fmt: skip
    record = runner.run(plan)
    print(f"wrote {out / RECORD}")
    if options.store is not None:
        _store(record, options.store)
    if not options.no_chart and {"ksa", "full_attention"} <= set(ops):
        draw(record, out / CHART)
        print(f"wrote {out / CHART}")


if __name__ == "__main__":
    main()
