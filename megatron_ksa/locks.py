"""One run writes an output: a lock file beside it names its holder, and is taken over when the holder is dead.

    with exclusive(Path("data/books"), "tools/preprocess_data.py"):
        ...

The lock of PATH is PATH.lock, of a folder FOLDER/run.lock (`exclusive_folder`). It appears with its content by a hard
link, which is atomic on local and on network file systems; without hard links by an exclusive create. The holder
touches it every `BEAT_SECONDS`. A second run finds the holder dead

- on the same machine (boot and process namespace): when no process has its id and start time;
- in the same Slurm job: when the job was requeued since (SLURM_RESTART_COUNT differs);
- otherwise: when `SILENT_SECONDS` pass without a touch. They are watched, not computed, so clocks may differ.

A holder that stands still for longer than that (a suspended machine) may lose the lock to a run on another machine;
`Lock.check` tells it, and is called before an output gets its name.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import writing

RUN_LOCK = "run.lock"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
_POLL_SECONDS = 0.5
# Seconds that a rank waits for its first rank's lock: where it sees none, because its file system may show it late; and
# where another run holds it, because the first rank may be watching that run.
NO_LOCK_SECONDS, OTHERS_LOCK_SECONDS = 20.0, SILENT_SECONDS + 60.0
_OF_A_START = (
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)  # fmt: skip
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        what: the program.
        host: name of the machine.
        machine: its boot and the process namespace, where process ids can be compared; "" where unknown.
        pid: process id.
        started: start of the process, clock ticks after boot; with the process id it names one process.
        job, restart: Slurm job and how often it was requeued; "" outside Slurm.
        since: UTC, ISO 8601.
        token: unique to this hold.
        run: the same for all ranks of one start of a distributed program.
    """

    what: str
    host: str
    machine: str
    pid: int
    started: int
    job: str
    restart: str
    since: str
    token: str
    run: str = ""

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.what} (host {self.host}, process {self.pid}{job}, since {self.since})"


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks after boot; None for one that is gone or has ended."""
    try:
        # The name, in parentheses, may hold spaces and parentheses of its own.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _this_run(what: str) -> Holder:
    return Holder(
        what=what, host=socket.gethostname(), machine=_machine(), pid=os.getpid(), started=_started(os.getpid()) or 0,
        job=os.environ.get("SLURM_JOB_ID", ""), restart=os.environ.get("SLURM_RESTART_COUNT", ""),
        since=datetime.now(UTC).isoformat(timespec="seconds"), token=uuid.uuid4().hex, run=_start(),
    )  # fmt: skip


def _start() -> str:
    """What the launcher tells all ranks of one start alike, and no other start."""
    return " ".join(os.environ.get(name, "") for name in _OF_A_START)


def _read(path: Path) -> tuple[Holder, int] | None:
    """A lock's holder and its last touch (nanoseconds of the file system's clock), or None where there is no lock."""
    try:
        with open(path, "rb") as stream:  # opening has network file systems ask for the current attributes
            content, status = stream.read(1 << 16), os.fstat(stream.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):
        # Not written to its end, or by something else: nothing is known of its holder.
        token = hashlib.sha256(content + str(status.st_ino).encode()).hexdigest()[:32]
        holder = Holder("another run", "unknown", "", 0, 0, "", "", "an unknown time", token)
    return holder, status.st_mtime_ns


def _is_dead(holder: Holder, me: Holder) -> bool | None:
    """Whether the holder is known to be dead; None where only its touches can tell."""
    if holder.machine and holder.machine == me.machine:
        return _started(holder.pid) != holder.started
    if holder.job and holder.job == me.job and holder.restart != me.restart:
        return True
    return None


def _is_silent(path: Path, holder: Holder, beat: int) -> bool:
    """Watch a lock: True when it was not touched for `SILENT_SECONDS`, False as soon as it was or is another one."""
    print(
        f"{path}: held by {holder}; waiting up to {SILENT_SECONDS:g} s for a sign of life", file=sys.stderr, flush=True
    )
    end = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        if (now := _read(path)) is None or now[0].token != holder.token or now[1] != beat:
            return False
    return True


def _claim(candidate: Path, target: Path, me: Holder) -> bool:
    """Give the candidate's content the name `target`, if that is free."""
    try:
        os.link(candidate, target)
        return True
    except FileExistsError:
        # A network file system may repeat a request that it has done.
        return (now := _read(target)) is not None and now[0].token == me.token
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    try:
        with open(target, "xb") as stream:
            stream.write(candidate.read_bytes())
        return True
    except FileExistsError:
        return False


def _acquire(path: Path, lock: Path, candidate: Path, me: Holder) -> None:
    """Make `lock` this run's.

    A dead holder's lock may be replaced by the one run that links the name LOCK.TOKEN.next, TOKEN being the dead
    holder's; should that run die as well, its own token continues the chain.
    """
    while not _claim(candidate, lock, me):
        chain, end, first = [], lock, None
        while (entry := _read(end)) is not None:
            holder, beat = entry
            first = first or holder
            dead = _is_dead(holder, me)
            if dead is None:
                dead = _is_silent(end, holder, beat)
                if not dead and ((now := _read(end)) is None or now[0].token != holder.token):
                    break  # it was released while this run watched
            if not dead:
                raise UsageError(
                    f"{path} is being written by {holder}: wait for it or choose another output "
                    f"(the lock is {lock}; delete it only if that run is gone)"
                )
            chain.append(end)
            end = lock.with_name(f"{lock.name}.{holder.token}.next")
        if not chain or _read(end) is not None or not _claim(candidate, end, me):
            continue
        now = _read(lock)
        if now is not None and now[0].token == first.token:
            print(f"{path}: taking over from a run that is gone, {first}", file=sys.stderr, flush=True)
            if os.path.samefile(candidate, end):
                os.replace(candidate, lock)
            else:  # no hard links here
                os.replace(end, lock)
            for stale in (*chain[1:], end):
                stale.unlink(missing_ok=True)
            return
        end.unlink(missing_ok=True)


class Lock:
    """A lock that this run holds and touches until `release`."""

    def __init__(self, path: Path, lock: Path, me: Holder) -> None:
        self._path, self._lock, self._me = path, lock, me
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"touch {lock.name}", daemon=True)
        self._thread.start()

    def _is_ours(self) -> bool:
        now = _read(self._lock)
        return now is not None and now[0].token == self._me.token

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._lock)

    def check(self) -> None:
        """Before an output gets its name.

        Raises:
            UsageError: another run took the lock over, because this one stood still, or somebody deleted it.
        """
        if not self._is_ours():
            now = _read(self._lock)
            raise UsageError(f"{self._path}: this run lost its lock to {now[0] if now else 'somebody who deleted it'}")

    def release(self) -> None:
        """Give the lock back."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._lock.unlink()


@contextmanager
def _held(path: Path, lock: Path, what: str) -> Iterator[Lock]:
    me = _this_run(what)
    candidate = lock.with_name(f"{lock.name}.{me.token}")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(candidate, "x", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(me)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            _acquire(path, lock, candidate, me)
        finally:
            candidate.unlink(missing_ok=True)
    held = Lock(path, lock, me)
    try:
        yield held
    finally:
        held.release()


@contextmanager
def exclusive(path: str | Path, what: str) -> Iterator[Lock]:
    """Keep other runs from writing the output `path` (a file, a folder that will appear, or a prefix) during the body.

    Args:
        path: the lock is PATH.lock beside it; the folder around it is made where there is none.
        what: this program, as a second run's error shall name it.

    Raises:
        UsageError: another run holds it (named), or the lock cannot be written.
    """
    path = Path(path)
    with _held(path, path.with_name(path.name + ".lock"), what) as held:
        yield held


@contextmanager
def exclusive_folder(folder: str | Path, what: str) -> Iterator[Lock]:
    """`exclusive` for a folder that runs share and continue: the lock is FOLDER/run.lock, and the folder is made."""
    with _held(Path(folder), Path(folder) / RUN_LOCK, what) as held:
        yield held


def wait_for_first_rank(folder: str | Path) -> None:
    """Wait until the first rank of this start holds `exclusive_folder`: what is read before may be another run's.

    Returns without it where no lock is there for `NO_LOCK_SECONDS`: the folder is on a disk of another machine, or the
    first rank was refused.

    Raises:
        UsageError: another run holds it for longer than the first rank watches it.
    """
    lock, begin = Path(folder) / RUN_LOCK, time.monotonic()
    while True:
        found, waited = _read(lock), time.monotonic() - begin
        if found is not None and found[0].run == _start():
            return
        if found is None and waited > NO_LOCK_SECONDS:
            return
        if found is not None and waited > OTHERS_LOCK_SECONDS:
            raise UsageError(f"{folder} is held by {found[0]}, and the first rank of this run did not take it over")
        time.sleep(_POLL_SECONDS / 10)
