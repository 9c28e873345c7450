"""Runs scripts in forked processes that have the trainer's imports already: 4 s of processor time less for each.

    python warm_server.py < requests    # a JSON line a request, answered by a JSON line

A request: {"script": path, "arguments": [...], "environment": {...}, "folder": working directory, "ranks": n, "out":
path, "error": path}. Each rank is a fork with the script as its main module, RANK and LOCAL_RANK in its environment and
its output appended to `out` and `error`. As under torchrun, the first rank that fails ends all others: SIGTERM, and
SIGKILL after half a minute. The answer is a list of exit codes by rank (negative: the signal) and the first rank that
failed, or null. With "session": true the script runs in one fork, the leader of a session of its own, and the answer,
which comes at once, is its process id; {"ended": process id} asks for its exit code, null while it runs. This process
never starts a thread, which is what makes its forks sound.
"""

import argparse
import atexit
import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
GRACE_SECONDS = 30
# Exit codes of the forks of `start`; `run` may be the one that reaps them.
_ENDED: dict[int, int] = {}


def warm_up() -> None:
    """Import what the trainer imports."""
    from megatron_ksa.platform import prepare_platform

    gc.disable()
    before = dict(os.environ)
    prepare_platform([])
    # 0.75 s of every rank's time: Megatron's tokenizers import transformers, and the optimizer what follows it.
    import megatron.core.models.mimo.optimizer  # noqa: F401
    import megatron.core.tokenizers.text.models  # noqa: F401
    import megatron.training.checkpointing  # noqa: F401
    from docstrings_once import read_docstrings_once
    from gloo_once import share_device
    from megatron.training.arguments import add_megatron_arguments

    import megatron_ksa.checkpoint.run_folder  # noqa: F401
    import megatron_ksa.training.configure  # noqa: F401
    import megatron_ksa.training.datasets  # noqa: F401
    import megatron_ksa.training.refusals  # noqa: F401
    import megatron_ksa.training.step  # noqa: F401

    read_docstrings_once()
    share_device()
    add_megatron_arguments(argparse.ArgumentParser())
    os.environ.clear()
    os.environ.update(before)
    # A fork's collector would visit all of it again, and copy its pages.
    gc.collect()
    gc.freeze()
    gc.enable()


def become(request: dict, rank: int) -> None:
    """Run the script as this process's main module, and end the process."""
    if request.get("session"):
        os.setsid()
    for target, path, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY | os.O_APPEND),
                               (2, request["error"], os.O_WRONLY | os.O_APPEND)):  # fmt: skip
        opened = os.open(path, mode | os.O_CREAT, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["ranks"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    code = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What the interpreter does at its end, before the destructors.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict) -> tuple[list[int], int | None]:
    """Exit codes by rank, and the first rank that failed."""
    ranks = {}
    for rank in range(request["ranks"] or 1):
        child = os.fork()
        if child == 0:
            become(request, rank)
        ranks[child] = rank
    codes, first, end = {}, None, None
    while len(codes) < len(ranks):
        child, status = os.waitpid(-1, 0 if end is None else os.WNOHANG)
        if child > 0 and child not in ranks:
            _ENDED[child] = os.waitstatus_to_exitcode(status)
        elif child in ranks:
            codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            if codes[ranks[child]] and first is None:
                first, end = ranks[child], time.monotonic() + GRACE_SECONDS
                _signal(ranks, codes, signal.SIGTERM)
        elif end is not None and child == 0:
            if time.monotonic() > end:
                _signal(ranks, codes, signal.SIGKILL)
            time.sleep(0.05)
    return [codes[rank] for rank in sorted(codes)], first


def start(request: dict) -> int:
    """The process id of a fork that runs the script."""
    child = os.fork()
    if child == 0:
        become(request, 0)
    return child


def ended(child: int) -> int | None:
    """The exit code of a fork of `start`, None while it runs."""
    if child not in _ENDED:
        found, status = os.waitpid(child, os.WNOHANG)
        if not found:
            return None
        _ENDED[child] = os.waitstatus_to_exitcode(status)
    return _ENDED[child]


def answer(request: dict) -> object:
    """What a request gets."""
    if "ended" in request:
        return ended(request["ended"])
    return start(request) if request.get("session") else run(request)


def _signal(ranks: dict[int, int], ended: dict[int, int], number: int) -> None:
    for child, rank in ranks.items():
        if rank not in ended:
            os.kill(child, number)


def main() -> None:
    # Standard output is for answers alone: what imports print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
