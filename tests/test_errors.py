"""One line a node for what all its ranks refuse, whichever of them comes to it first."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.platform.ports import free_port

# Seconds before each rank refuses.
RANKS = """
import os, sys, time
from megatron_ksa import errors
errors.FIRST_RANK_SECONDS = 3
with errors.usage_errors_exit():
    time.sleep(float(sys.argv[1 + int(os.environ["RANK"])]))
    raise errors.UsageError("no such file")
"""


@pytest.mark.parametrize("seconds", [("0.5", "0"), ("60", "0"), ("0", "60")])
def test_ranks_refuse_in_one_line(seconds, tmp_path):
    """The second rank ended without a word, and the launcher ended the first rank before it printed the line."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([sys.executable, *launcher, str(script), *seconds], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == ["error: no such file"]
    assert "exitcode  : 2" in done.stderr


def test_names_that_are_not_utf8_are_printed():
    """A file name of other bytes in a folder ended a run in UnicodeEncodeError, where it was to be named."""
    script = (
        "import sys\nfrom megatron_ksa.errors import *\nwith usage_errors_exit():\n"
        "    print(sys.argv[1])\n    raise UsageError(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, os.fsdecode(b"\xfe.md")], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == (b"\\udcfe.md\n", b"error: \\udcfe.md\n")


@pytest.mark.parametrize("rank", ["0", None])
def test_a_rank_writes_a_line_at_once(rank):
    """Under torchrun's `python -u` a line and its end were two writes: lines of two ranks stood in one."""
    script = (
        "from megatron_ksa.errors import *\nwith usage_errors_exit():\n    print('said')\n    raise UsageError('no')"
    )
    environment = {**os.environ} | ({} if rank is None else {"RANK": rank})
    # Each write is a datagram.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        command = [sys.executable, "-u", "-c", script]
        assert subprocess.run(command, stdout=theirs, stderr=theirs, env=environment).returncode == 2
        assert ours.recv(100) == (b"said" if rank is None else b"said\n")
        assert ours.recv(100) == (b"\n" if rank is None else b"error: no\n")


def test_a_name_too_long_for_a_file_is_one_line(capsys):
    """Looking for it is an OSError of the system's, which was a traceback."""
    with pytest.raises(SystemExit) as stopped, usage_errors_exit():
        Path("9" * 300).is_file()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {'9' * 100}...: a longer name than a file can have\n"
