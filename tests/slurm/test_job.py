"""The 70B job script, made tiny, under a real Slurm: it saves on SIGTERM, requeues itself, resumes and finishes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from one_node import require_slurm, running_slurm

ROOT = Path(__file__).parents[2]
ITERATIONS = 40
LINE = re.compile(r"iteration +(\d+)/ +\d+ .*lm loss: ([0-9.E+-]+)")


def wait_for(condition, seconds: float, describe):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.3)
    raise AssertionError(describe())


@pytest.mark.slow
def test_job_saves_requeues_resumes_and_finishes(tmp_path):
    require_slurm()
    cluster = tmp_path / "cluster.env"
    cluster.write_text(
        f"RANKS_PER_NODE=2\nCPUS_PER_RANK=1\nVENV={sys.prefix}\nCONTAINER_IMAGE=\nCOMMAND_PREFIX=()\n"
        f"OUTPUT={tmp_path}/runs\nTOKENIZER_MODEL=unused\nDATA_ARGS_PATH=unused\nexport OMP_NUM_THREADS=1\n"
    )
    run, log = tmp_path / "runs/ksa_70b", tmp_path / "job.log"

    def logged(start: int) -> dict[int, float]:
        """Loss by iteration in the logs of all ranks of a start of the job; the last rank writes it."""
        texts = [path.read_text() for path in run.glob(f"logs/*-{start}/rank-*.log")]
        return {int(iteration): float(loss) for text in texts for iteration, loss in LINE.findall(text)}

    def everything() -> str:
        ranks = "".join(f"\n{path}:\n{path.read_text()[-2000:]}" for path in sorted(run.glob("logs/*/*.log")))
        return (log.read_text() if log.exists() else "no job log") + ranks

    folder = tmp_path / "slurm"
    folder.mkdir()
    with running_slurm(folder) as environment:

        def slurm(*command: str) -> str:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        job = slurm(
            "sbatch", "--parsable", "--nodes=1", f"--output={log}", "slurm/pretrain_ksa_70b.sh", "--cluster",
            str(cluster), "--override", "slurm/overrides/tiny.args", "--", "--train-iters", str(ITERATIONS),
            "--save-interval", "1000",
        ).strip()  # fmt: skip

        def state() -> str:
            return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]

        wait_for(lambda: 3 in logged(0), 90, everything)
        # What Slurm does to the steps of a job that reaches --signal's time.
        slurm("scancel", "--signal=TERM", job)
        wait_for(lambda: "requeueing" in log.read_text(), 40, everything)
        wait_for(lambda: state() == "PENDING", 40, everything)
        # Slurm holds a requeued job back for two minutes; a node refuses it in the second in which it was killed.
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        wait_for(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"), 90, everything)
        assert state() == "COMPLETED", everything()

    first, second = logged(0), logged(1)
    assert sorted(first) + sorted(second) == list(range(1, ITERATIONS + 1))
    assert 3 <= len(first) < ITERATIONS
    assert f"saved at iteration {len(first)} of {ITERATIONS}, requeueing" in log.read_text()
    assert f"finished at iteration {ITERATIONS}" in log.read_text()
    assert len(list(run.glob("logs/*-1/rank-*.log"))) == 2
