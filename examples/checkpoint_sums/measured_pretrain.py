"""`pretrain_gpt.py` whose one save, or one load, is done again and again: with sums, with sizes alone, and plainly.

Usage: measured_pretrain.py RECORD.json ROUNDS SECONDS FLAGS...

Each round does every way once, in an order that turns, so that what else the machine does meets all of them; no round
begins after so many seconds. A load is measured from the file system's cache, and from the disk: before it the system
is asked to drop what it holds of the checkpoint's files, and nothing else. Whether it did shows in the bytes that the
load took from the disk.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import torch.distributed as dist  # noqa: E402

import pretrain_gpt  # noqa: E402
from megatron_ksa.files import whole_file  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402

# Nothing of this project's around Megatron's save or load, sizes of the files, sizes and XXH3 sums.
WAYS = ("plain", "sizes", "sums")


class Measurement:
    """Times of every way, seconds: of the slowest rank; of all ranks' processors together, and in user mode alone."""

    def __init__(self, record: Path, rounds: int, seconds: float) -> None:
        self.record, self.rounds, self.found = record, rounds, []
        self.end = time.monotonic() + seconds

    def turns(self) -> Iterator[tuple[int, list[str]]]:
        """The rounds, as many as there is time for, at least one; the first rank decides."""
        for turn, ways in _orders(self.rounds):
            goes_on = [turn == 0 or time.monotonic() < self.end]
            dist.broadcast_object_list(goes_on)
            if not goes_on[0]:
                return
            yield turn, ways

    def add(self, what: str, turn: int, way: str, work: Callable[[], object]) -> object:
        """Do the work on all ranks, and note how long it takes."""
        dist.barrier()
        read = _bytes_from_disk()
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        result = work()
        own, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        spent: list = [None] * dist.get_world_size()
        times = (own, now.ru_utime - used.ru_utime, now.ru_stime - used.ru_stime)
        dist.all_gather_object(spent, (*times, _bytes_from_disk() - read))
        row = {"what": what, "round": turn, "way": way, "seconds": max(each[0] for each in spent)}
        row["user_seconds"] = sum(each[1] for each in spent)
        row["processor_seconds"] = row["user_seconds"] + sum(each[2] for each in spent)
        row["bytes_from_disk"] = sum(each[3] for each in spent)
        self.found.append(row)
        return result

    def write(self, size: int) -> None:
        """Store what was measured, by the first rank."""
        if dist.get_rank() == 0:
            with whole_file(self.record) as stream:
                json.dump({"bytes": size, "times": self.found}, stream)


def _bytes_from_disk() -> int:
    """What this process has had read from storage so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _forget(folder: Path) -> None:
    """Ask the system to drop its cache of a folder's files."""
    for path in _files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _orders(rounds: int) -> list[tuple[int, list[str]]]:
    """Every way once a round; each is first, second and last equally often."""
    return [(turn, [WAYS[(turn + place) % 3] for place in range(3)]) for turn in range(rounds)]


def measured_save(measurement: Measurement, args, save: Callable) -> Callable:
    """Megatron's save, as often as there are rounds and ways; the last one stays."""
    from megatron_ksa.checkpoint.checked_save import checked_save
    from megatron_ksa.upstream import checkpoint_sums
    from megatron_ksa.upstream.patches import apply

    @wraps(save)
    def saves(iteration: int, *rest, **options) -> None:
        folder = Path(args.save) / f"iter_{iteration:07d}"

        def once(way: str, turn: int) -> None:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            patches = () if way == "plain" else checkpoint_sums.patches(way == "sums")
            with apply(patches):
                call = save if way == "plain" else checked_save(save, args)
                measurement.add("save", turn, way, lambda: call(iteration, *rest, **options))

        once("plain", -1)  # warms up
        measurement.found.clear()
        for turn, ways in measurement.turns():
            for way in ways:
                once(way, turn)
        once("sums", measurement.rounds)
        measurement.found.pop()
        measurement.write(sum(path.stat().st_size for path in _files(folder)))

    return saves


def measured_load(measurement: Measurement, args, settings, load: Callable) -> Callable:
    """Megatron's load, as often as there are rounds and ways."""
    from megatron_ksa.checkpoint.checked_load import checked_load
    from megatron_ksa.checkpoint.dense import dense_start
    from megatron_ksa.upstream import checkpoint_comparison
    from megatron_ksa.upstream.patches import apply

    plain = dense_start(load, args, settings)
    calls = {"plain": plain}
    for way in WAYS[1:]:
        checks = replace(settings.checkpoint, content_sums=way == "sums")
        calls[way] = checked_load(plain, args, replace(settings, checkpoint=checks))

    def call(way: str, *rest, **options) -> tuple[int, int]:
        with apply(checkpoint_comparison.PATCHES if way == "sums" else ()):
            return calls[way](*rest, **options)

    @wraps(load)
    def loads(*rest, **options) -> tuple[int, int]:
        if not (Path(args.load) / "latest_checkpointed_iteration.txt").is_file():
            return load(*rest, **options)
        done = plain(*rest, **options)
        for turn, ways in measurement.turns():
            for cold in (False, True):
                for way in ways:
                    if cold and dist.get_rank() == 0:
                        _forget(Path(args.load))
                    what = "load from disk" if cold else "load from cache"
                    done = measurement.add(what, turn, way, lambda way=way: call(way, *rest, **options))
        measurement.write(sum(path.stat().st_size for path in _files(Path(args.load))))
        return done

    return loads


def main() -> None:
    record, rounds, seconds, *flags = sys.argv[1:]
    # What is read is compared where this program says so.
    sys.argv = [sys.argv[0], *flags, "--no-checkpoint-sums"]
    prepare_platform(sys.argv[1:])
    from megatron_ksa.training import configure
    from megatron_ksa.upstream import checkpoint_sums
    from megatron_ksa.upstream.trainer import LOAD_CHECKPOINT, SAVE_CHECKPOINT

    measurement, of_the_run = Measurement(Path(record), int(rounds), float(seconds)), configure.trainer_patches
    replaced = {patch.target for patch in (LOAD_CHECKPOINT, SAVE_CHECKPOINT, *checkpoint_sums.PATCHES)}

    def trainer_patches(args, settings, *rest) -> list:
        others = [patch for patch in of_the_run(args, settings, *rest) if patch.target not in replaced]
        return [
            *others,
            SAVE_CHECKPOINT.given(lambda save: measured_save(measurement, args, save)),
            LOAD_CHECKPOINT.given(lambda load: measured_load(measurement, args, settings, load)),
        ]

    configure.trainer_patches = trainer_patches
    with contextlib.suppress(KeyboardInterrupt):
        pretrain_gpt.main()


if __name__ == "__main__":
    main()
