"""What becomes of a job after its ranks have ended, with stand-ins for Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# It saves, and signals the job's shell as Slurm does when it stops a job.
SRUN = """#!/bin/bash
[[ $SAVED ]] && echo -n "$SAVED" >"$LATEST"
[[ $STOPPED ]] && kill -TERM $PPID
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo node1 ;;
  requeue) echo "requeued $2" ;;
esac
"""


@pytest.mark.parametrize(
    ("before", "saved", "code", "stopped", "requeued", "exit_code", "message"),
    [
        ("", "20", 0, False, False, 0, "finished at iteration 20"),
        ("", "7", 0, False, True, 0, "saved at iteration 7 of 20, requeueing"),
        ("7", "", 0, False, False, 1, "got no further than iteration 7"),
        ("", "", 1, False, False, 1, "got no further than iteration 0"),
        ("7", "7", 137, False, False, 137, "ended with exit code 137"),
        ("7", "10", 137, False, True, 0, "saved at iteration 10 of 20, requeueing"),
        ("7", "10", 0, True, False, 0, "stopped by Slurm, saved at iteration 10 of 20"),
        ("7", "", 143, True, False, 143, "stopped by Slurm, saved at iteration 7 of 20"),
        # It fails after the last save: the next start finds nothing to do.
        ("7", "20", 1, False, True, 0, "saved at iteration 20 of 20, requeueing"),
        ("20", "", 0, False, False, 0, "finished at iteration 20"),
    ],
)
def test_a_job_requeues_itself_while_it_gets_further(
    tmp_path, before, saved, code, stopped, requeued, exit_code, message
):
    latest = tmp_path / "runs/ksa_70b/checkpoints/latest_checkpointed_iteration.txt"
    latest.parent.mkdir(parents=True)
    if before:
        latest.write_text(before)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    cluster = tmp_path / "cluster.env"
    cluster.write_text(
        f"RANKS_PER_NODE=1\nCPUS_PER_RANK=1\nVENV={sys.prefix}\nCONTAINER_IMAGE=\nCOMMAND_PREFIX=()\n"
        f"OUTPUT={tmp_path}/runs\nTOKENIZER_MODEL=unused\nDATA_ARGS_PATH=unused\n"
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "LATEST": str(latest)}
    ends = {"SAVED": saved, "CODE": str(code), "STOPPED": "yes" if stopped else ""}
    command = ["bash", "slurm/launch.sh", "ksa_70b", "--cluster", str(cluster), "--", "--train-iters", "20"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
        env={**os.environ, **job, **ends, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    assert ("requeued 7" in done.stdout) == requeued, done.stdout + done.stderr
    assert done.returncode == exit_code and message in done.stdout + done.stderr
