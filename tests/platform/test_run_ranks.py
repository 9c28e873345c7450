"""Ranks that torchrun starts for a script that looks at their outcome."""

import time

import pytest

from megatron_ksa.platform.ranks import run_ranks

pytestmark = pytest.mark.slow
# Neither rank imports torch. A line is one write, as where `usage_errors_exit` is around it.
SCRIPT = """
import os, sys, time
sys.stdout.write(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has {os.environ['GIVEN']}\\n")
sys.stderr.write("to stderr\\n")
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return [str(tmp_path / "script.py"), str(tmp_path)]


def test_what_all_ranks_print(script):
    done = run_ranks([*script, "0"], 2, seconds=100, environment={"GIVEN": "this"})
    assert done.returncode == 0 and "to stderr" in done.stderr
    assert {"rank 0 of 2 has this", "rank 1 of 2 has this"} <= set(done.stdout.splitlines())


def test_ranks_of_no_use_are_ended(script, tmp_path):
    began = time.monotonic()
    there = [tmp_path / str(rank) for rank in range(2)]
    done = run_ranks([*script, "600"], 2, ended=lambda: all(path.exists() for path in there), environment={"GIVEN": ""})
    assert done.returncode != 0 and time.monotonic() - began < 300
