"""The folder that a run saves to: one run writes it, it can be written, and its tracker is not lost."""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ksa.checkpoint.integrity import damage, iterations
from megatron_ksa.checkpoint.load import TRACKER
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file, writing
from megatron_ksa.locks import exclusive_folder, wait_for_first_rank

TRACKER_SECONDS = 60.0


@contextmanager
def only_writer(args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Keep a second training from saving into `--save` during the body, and notice a folder that cannot be written.

    The first rank holds the lock for all of them. The others wait for it where they read what is in the folder: the run
    before may be saving still. A folder that is made for the lock goes again where the body refuses the command line.

    Yields:
        What raises where another run has taken the lock over.

    Raises:
        UsageError: another run saves there, or the folder cannot be written.
    """
    if args.save is None or getattr(args, "enable_msc", False):
        yield lambda: None
        return
    if args.rank != 0:
        if args.load is not None and Path(args.load).resolve() == Path(args.save).resolve():
            wait_for_first_rank(args.save)
        yield lambda: None
        return
    missing = [path for path in (Path(args.save), *Path(args.save).parents) if not path.exists()]
    try:
        with exclusive_folder(args.save, "pretrain_gpt.py --save") as lock:
            with writing(Path(args.save)), tempfile.TemporaryFile(dir=args.save) as probe:
                probe.write(b"0")
            yield lock.check
    except UsageError:
        with contextlib.suppress(OSError):  # what is not empty stays
            for path in missing:
                path.rmdir()
        raise


def restore_tracker(args: argparse.Namespace) -> None:
    """Write the tracker of `--load` anew where it is missing and iterations are there, naming the newest whole one.

    A rank can be killed between a save and the write of its tracker. Without one Megatron starts anew, and its saves
    replace the iterations that are there.

    Raises:
        UsageError: `--load` is not the folder that this run saves to, so that it is not written.
    """
    if not args.load or getattr(args, "enable_msc", False) or not Path(args.load).is_dir():
        return
    root = Path(args.load)
    if (root / TRACKER).is_file() or not (stored := list(iterations(root))):
        return
    whole = next((number for number, path in stored if damage(path, contents=False) is None), None)
    listed = ", ".join(str(number) for number, _ in stored)
    if whole is None:
        if args.rank == 0:
            what = f"no iteration is complete ({listed}), no tracker names one"
            print(f"--load {root}: {what}: training starts anew", flush=True)
        return
    if args.save is None or Path(args.save).resolve() != root.resolve():
        raise UsageError(
            f"--load {root} has iterations {listed} but no {TRACKER}, which names the one to load: restore it, its "
            f"content is the number {whole}"
        )
    if args.rank == 0:
        print(f"--load {root}: {TRACKER} is missing; going on from iteration {whole}, the newest whole one", flush=True)
        with writing(root / TRACKER), whole_file(root / TRACKER) as stream:
            stream.write(str(whole))
        return
    end = time.monotonic() + TRACKER_SECONDS
    while not (root / TRACKER).exists():
        if time.monotonic() > end:
            raise UsageError(f"--load {root}: {TRACKER} is missing, and the first rank did not restore it")
        time.sleep(0.1)
