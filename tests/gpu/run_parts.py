"""Everything that wants a GPU, checked and measured in order of importance within the time that there is.

    python tests/gpu/run_parts.py one_gpu OUT [PART ...] --seconds 560 --pack results.tar.gz
    python tests/gpu/run_parts.py several_gpus OUT [PART ...] --seconds 400 --te /path/with/transformer_engine
    python tests/gpu/run_parts.py several_gpus OUT --list

Each part is a command of its own with a limit (`gpu_parts.py`): one that fails or hangs costs its own results alone.
Results are JSON files in OUT, written as they come, with a log for each part and `parts.json`, which says how each one
went. A second call goes on: parts that went well are left out unless they are named. Parts that measure no times run
together. What is compiled goes to the caches of Triton and torch, which all processes of the machine share.

Transformer Engine's parts need the package; with --te its folder is on the path for them alone, and the other parts
measure what a machine without it has. Exit code 0 where all parts that ran went well.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from gpu_parts import ONE_GPU, Part, several_gpus, tiny

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from megatron_ksa.files import check_writable, whole_file  # noqa: E402

# A command is told that it has so many seconds less than its limit; ended, it has so many to end its own processes.
SPARE, GRACE = 10, 40
# With less time left, no part is started.
SHORTEST = 30
RECORD = "parts.json"


class Runner:
    """Runs parts and keeps how they went.

    Args:
        out: folder of the results.
        end: when all must be over, by `time.monotonic`.
        te: folder with Transformer Engine, or None where it is on the path already or nowhere.
        words: what stands for COMMIT in commands.
        pack: archive of `out`, written after each part.
        gpus: their number, which stands for GPUS in commands.
    """

    def __init__(
        self, out: Path, end: float, te: Path | None, words: dict[str, str], pack: Path | None, gpus: int = 1
    ) -> None:
        self.out, self.end, self.te, self.pack, self.gpus = out, end, te, pack, gpus
        self.words = {**words, "GPUS": str(gpus)}
        self.lock = Lock()
        record = out / RECORD
        self.record: dict[str, dict] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}

    def run(self, parts: list[Part]) -> None:
        """Run parts beside each other; those that have a GPU of their own as GPUs are free, in their order."""
        free: SimpleQueue[int] = SimpleQueue()
        for gpu in range(self.gpus):
            free.put(gpu)
        with ThreadPoolExecutor(self.gpus if parts[0].own_gpu else len(parts)) as pool:
            list(pool.map(lambda part: self._run_on(part, free), parts))

    def _run_on(self, part: Part, free: SimpleQueue[int]) -> None:
        left = self.end - time.monotonic()
        if left < SHORTEST:
            self._keep(part, {"state": "not run", "why": "the time is over", "seconds": 0})
            return
        gpu = free.get() if part.own_gpu else None
        try:
            self._run(part, min(part.limit, left), self._environment(part, gpu))
        finally:
            if gpu is not None:
                free.put(gpu)

    def _run(self, part: Part, limit: float, environment: dict[str, str]) -> None:
        began = time.monotonic()
        if part.te and not _importable("transformer_engine", environment):
            self._keep(part, {"state": "skipped", "why": "Transformer Engine is not installed", "seconds": 0})
            return
        words = {"OUT": str(self.out), "LEFT": f"{max(limit - SPARE, SPARE):.0f}", **self.words}
        command = [sys.executable, *(_filled(word, words) for word in part.command)]
        log = self.out / f"{part.name}.log"
        with log.open("w", encoding="utf-8") as stream:
            print(*command, file=stream, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
            try:
                state = "ok" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "cut"
                _end(process)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        why = "" if state == "ok" else f"after {limit:.0f} s" if state == "cut" else f"exit code {process.returncode}"
        done = {"state": state, "why": why, "seconds": round(time.monotonic() - began), "takes": part.takes}
        self._keep(part, done, [] if state == "ok" else lines[-15:])

    def _environment(self, part: Part, gpu: int | None) -> dict[str, str]:
        folders = [str(ROOT), *([str(self.te)] if part.te and self.te else []), os.environ.get("PYTHONPATH", "")]
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        return {**os.environ, **visible, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}

    def _keep(self, part: Part, done: dict, lines: list[str] | None = None) -> None:
        with self.lock:
            self.record[part.name] = done
            with whole_file(self.out / RECORD) as stream:
                stream.write(json.dumps(self.record, indent=1) + "\n")
            if self.pack:
                pack(self.out, self.pack)
            print(line(part.name, done), flush=True)
            for text in lines or ():
                print(f"    {text[:300]}", flush=True)


def line(name: str, done: dict) -> str:
    """How a part went."""
    return f"{name:12} {done['state']:8} {done['seconds']:4} s  {done['why']}".rstrip()


def _filled(word: str, words: dict[str, str]) -> str:
    """A word of a command with what stands in it replaced: OUT may begin a path."""
    if word.startswith("OUT/"):
        return word.replace("OUT", words["OUT"], 1)
    return words.get(word, word)


def _importable(package: str, environment: dict[str, str]) -> bool:
    """Whether a package's module is found in this environment; importing it takes seconds."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def _end(process: subprocess.Popen) -> None:
    """End a command with all of its group; torchrun among them ends its ranks, which are groups of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        over = time.monotonic() + GRACE
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < over:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.2)
        except ProcessLookupError:
            return


def pack(folder: Path, archive: Path) -> None:
    """Write the files of a folder to an archive, whole or not at all."""
    new = archive.with_name(f".{archive.name}")
    with tarfile.open(new, "w:gz") as stream:
        stream.add(folder, arcname=".")
    new.replace(archive)


def sets(parts: list[Part]) -> list[list[Part]]:
    """Parts in their order, neighbours that run together in one list."""
    found: list[list[Part]] = []
    for part in parts:
        before = found[-1] if found else [part]
        if found and ((part.own_gpu and before[0].own_gpu) or (part.together and before[0].together)):
            before.append(part)
        else:
            found.append([part])
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", choices=("one_gpu", "several_gpus"), help="which parts")
    parser.add_argument("out", type=Path, help="folder of the results, which a second call goes on with")
    parser.add_argument("parts", nargs="*", metavar="PART", help="these alone, in this order, and again")
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), help="unset: those of this machine")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing runs; unset: no limit")
    parser.add_argument("--te", type=Path, help="folder with Transformer Engine, for the parts that need it")
    parser.add_argument(
        "--pack", type=Path, help="archive of OUT, written after each part; a call begins with its files"
    )
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--tiny", action="store_true", help="a trial without GPUs: the parts that have one, small")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and end")
    return parser.parse_intermixed_args()


def chosen(parts: tuple[Part, ...], options: argparse.Namespace, record: dict[str, dict]) -> list[Part]:
    """Those of the machine's parts that are to run.

    Raises:
        SystemExit: another name.
    """
    if unknown := sorted(set(options.parts) - {part.name for part in parts}):
        raise SystemExit(f"error: part {unknown[0]}: use some of {', '.join(part.name for part in parts)}")
    if options.parts:
        wanted = [part for name in options.parts for part in parts if part.name == name]
    else:
        wanted = [part for part in parts if not part.own_gpu and record.get(part.name, {}).get("state") != "ok"]
    return [small for part in wanted if (small := tiny(part))] if options.tiny else wanted


def main() -> None:
    """Run the parts in turns and say how they went."""
    options = parse_arguments()
    gpus = options.gpus or 0
    if not gpus:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.machine == "several_gpus" and gpus not in (2, 4, 8):
        raise SystemExit(f"error: {gpus} GPUs are here: give their number, --gpus 2, 4 or 8")
    available = ONE_GPU if options.machine == "one_gpu" else several_gpus(gpus)
    if options.list:
        for part in available:
            print(f"{part.name:12} {part.takes:4} s, at most {part.limit:3}  {part.what}")
        return
    check_writable(options.out.parent)
    options.out.mkdir(exist_ok=True)
    out = options.out.resolve()
    if options.pack and options.pack.exists():
        with tarfile.open(options.pack) as stream:
            stream.extractall(out, filter="data")
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        or "unknown"
    )
    end = time.monotonic() + options.seconds
    runner = Runner(out, end, options.te, {"COMMIT": commit}, options.pack, max(gpus, 1))
    parts = chosen(available, options, runner.record)
    for together in sets(parts):
        print(f"== {', '.join(part.name for part in together)}", flush=True)
        runner.run(together)
    print(*(line(part.name, runner.record[part.name]) for part in parts), sep="\n")
    sys.exit(any(runner.record[part.name]["state"] in ("failed", "cut") for part in parts))


if __name__ == "__main__":
    main()
