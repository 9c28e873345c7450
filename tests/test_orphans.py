"""A rank under torchrun ends when its launcher does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = (
    "import time; from megatron_ksa.orphans import end_with_launcher; end_with_launcher(); print('up', flush=True); "
    "time.sleep(60)"
)
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}])"


def ends(environment: dict[str, str], seconds: float) -> bool:
    """Whether a rank ends within so many seconds of its launcher's kill -9."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as launcher:
        assert launcher.stdout.readline() == "up\n"
        (rank,) = map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split())
        os.kill(launcher.pid, signal.SIGKILL)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.kill(rank, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        os.kill(rank, signal.SIGKILL)
        return False


def test_ranks_end_with_a_killed_launcher():
    """Ranks trained on, 15 to 91 of them in 8 seconds."""
    assert ends({"TORCHELASTIC_RUN_ID": "test", "RANK": "3"}, 30)


def test_a_background_job_outlives_its_shell():
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    assert "TORCHELASTIC_RUN_ID" not in environment and not ends({}, 2.5)
