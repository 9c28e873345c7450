"""Ranks of one machine, started by torchrun, for scripts that train in several processes and look at the outcome."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from megatron_ksa.platform.ports import free_port

# How often `ended` is asked.
POLL_SECONDS = 1.0


def run_ranks(
    script: Sequence[str],
    ranks: int,
    *,
    seconds: float | None = None,
    ended: Callable[[], bool] = lambda: False,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a script in so many processes until all end, the time is over, or `ended` says that it is no use to wait.

    Args:
        script: path and arguments.
        seconds: after which the launcher is told to end its ranks; unset: never.
        ended: asked once a second.
        environment: variables beside this process's own.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    launched = subprocess.Popen(
        [sys.executable, *launcher, *script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )  # fmt: skip
    waited = 0.0
    while True:
        try:
            out, errors = launched.communicate(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            waited += POLL_SECONDS
        if ended() or (seconds is not None and waited >= seconds):
            # The launcher ends its ranks, with SIGKILL after half a minute.
            launched.terminate()
            out, errors = launched.communicate()
            break
    return subprocess.CompletedProcess(launched.args, launched.returncode, out, errors)
