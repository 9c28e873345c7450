"""Helper processes of a save; with a trainer around them in tests/training/test_failure.py."""

import multiprocessing
import signal
import subprocess
import time

import pytest

from megatron_ksa.child_processes import blocked, serve_one_rank


def serve(ready) -> None:
    serve_one_rank()
    ready.set()
    time.sleep(600)


# Megatron's worker comes from a forkserver.
@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_only_the_rank_ends_its_helper(start, monkeypatch):
    """A helper in which numpy or torch had more threads died of SIGTERMs to all: one thread alone had it blocked."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    context = multiprocessing.get_context(start)
    ready = context.Event()
    helper = context.Process(target=serve, args=(ready,), daemon=True)
    with blocked(signal.SIGTERM):
        helper.start()
    assert ready.wait(120)
    subprocess.run(["kill", "-TERM", str(helper.pid)], check=True)
    helper.join(1)
    assert helper.is_alive()
    helper.terminate()
    helper.join(20)
    assert helper.exitcode == 0
