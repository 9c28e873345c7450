"""The 70B job script, made tiny, on two nodes of a real Slurm: signals, cancelled jobs, lost nodes, time limits."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_nodes import NODES, ROOT, Slurm, require_slurm, running_slurm

pytestmark = pytest.mark.slow
LINE = re.compile(r"iteration +(\d+)/ +\d+ .*lm loss: ([0-9.E+-]+)")
ENDLESS = 1_000_000
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    require_slurm()
    with running_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def cluster_file(folder: Path, tokenizer: str = "unused") -> Path:
    """What differs between clusters."""
    path = folder / "cluster.env"
    path.write_text(
        f"RANKS_PER_NODE=1\nCPUS_PER_RANK=1\nVENV={sys.prefix}\nCONTAINER_IMAGE=\nCOMMAND_PREFIX=()\n"
        f"OUTPUT={folder}/runs\nTOKENIZER_MODEL={tokenizer}\nDATA_ARGS_PATH=unused\nexport OMP_NUM_THREADS=1\n"
    )
    return path


class Job:
    """A submitted job of two ranks, one a node: tensor and sequence parallelism between the nodes."""

    def __init__(self, slurm: Slurm, folder: Path, iterations: int, save_interval: int, *options: str) -> None:
        self.slurm, self.iterations = slurm, iterations
        self.run, self.log = folder / "runs/ksa_70b", folder / "job.log"
        self.id = slurm(
            "sbatch", "--parsable", "--nodes=2", f"--output={self.log}", *options, "slurm/pretrain_ksa_70b.sh",
            "--cluster", str(cluster_file(folder)), "--override", "slurm/overrides/tiny.args", "--",
            "--train-iters", str(iterations), "--save-interval", str(save_interval),
        ).strip()  # fmt: skip

    def losses(self, start: int) -> dict[int, float]:
        """Loss by iteration in the logs of a start of the job; the last rank writes it."""
        texts = [path.read_text() for path in self.run.glob(f"logs/*-{start}/rank-*.log")]
        return {int(iteration): float(loss) for text in texts for iteration, loss in LINE.findall(text)}

    def saved(self) -> int:
        """Iteration of the newest complete checkpoint, 0 without one."""
        latest = self.run / "checkpoints/latest_checkpointed_iteration.txt"
        return int(latest.read_text() or 0) if latest.exists() else 0

    def told(self) -> str:
        """The job's own log."""
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        """The job's state; COMPLETING while its processes end, whatever becomes of it then."""
        return re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", self.id))[1]

    def wait(self, condition, seconds: float) -> None:
        """Wait until `condition()` is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                ranks = "".join(f"\n{log}:\n{log.read_text()[-2000:]}" for log in sorted(self.run.glob("logs/*/*.log")))
                raise AssertionError(f"{self.state()}\n{self.told()}{ranks}")
            time.sleep(0.3)

    def restart(self) -> None:
        """Wait until the job is requeued, and let it start at once: Slurm holds requeued jobs back for two minutes."""
        self.wait(lambda: self.state() == "PENDING", 60)
        self.slurm.wait_for_nodes()
        # A node refuses a job in the second in which it was killed there.
        self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now+3")

    def cancel(self) -> None:
        """Cancel the job; it saves, and it stays cancelled."""
        self.slurm("scancel", self.id)
        self.wait(lambda: self.state() == "CANCELLED", 60)
        self.slurm.wait_for_nodes()
        assert f"stopped by Slurm, saved at iteration {self.saved()} of {self.iterations}" in self.told()


def assert_same_where_both_trained(first: dict[int, float], second: dict[int, float]) -> None:
    """Apart from the second line of a start: Megatron makes it the mean of the start's first two iterations."""
    both = sorted(first.keys() & second.keys() - {min(second) + 1})
    assert [first[iteration] for iteration in both] == [second[iteration] for iteration in both]


def test_job_saves_requeues_resumes_and_finishes(slurm, tmp_path):
    """A save before the signal is part of it: see test_sigterm_to_every_process_saves."""
    job = Job(slurm, tmp_path, 20, 3)
    job.wait(lambda: 4 in job.losses(0), 90)
    # What Slurm does to the steps of a job that reaches --signal's time.
    slurm("scancel", "--signal=TERM", job.id)
    job.wait(lambda: "requeueing" in job.told(), 40)
    job.restart()
    job.wait(lambda: job.state() in ENDED, 90)
    assert job.state() == "COMPLETED", job.told()
    first, second = job.losses(0), job.losses(1)
    assert sorted(first) + sorted(second) == list(range(1, 21))
    assert 4 <= len(first) < 20
    assert f"saved at iteration {len(first)} of 20, requeueing" in job.told()
    assert "finished at iteration 20" in job.told()
    assert len(list(job.run.glob("logs/*-1/rank-*.log"))) == 2


@pytest.mark.parametrize("way", ["set down", pytest.param("power off", marks=pytest.mark.long)])
def test_lost_node_requeues_and_resumes_from_the_last_checkpoint(slurm, tmp_path, way):
    """The second start trains what the first had trained since its last checkpoint, to the same losses."""
    job = Job(slurm, tmp_path, ENDLESS, 10)
    job.wait(lambda: 13 in job.losses(0), 90)
    if way == "set down":
        slurm("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
        job.wait(lambda: job.state() == "PENDING", 60)
        slurm("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    else:
        slurm.kill_node(NODES[1])
        job.wait(lambda: job.state() == "PENDING", 60)
        slurm.start_node(NODES[1])
    job.restart()
    first, saved = job.losses(0), job.saved()
    # A node that is set down ends its tasks with a SIGTERM, which leaves time for a save.
    assert saved >= 10 if way == "set down" else (saved % 10 == 0)
    job.wait(lambda: len(job.losses(1)) > 5, 90)
    job.cancel()
    assert min(job.losses(1)) == saved + 1
    assert_same_where_both_trained(first, job.losses(1))
    assert job.saved() == max(job.losses(1))


@pytest.mark.long
def test_killed_rank_requeues_once_and_then_fails(slurm, tmp_path):
    """A failure is tried again where a checkpoint was saved since the start, so that one that repeats ends the job."""
    job = Job(slurm, tmp_path, ENDLESS, 20)
    job.wait(lambda: job.saved() == 20, 120)
    slurm.kill_tasks(NODES[1])
    job.wait(lambda: "requeueing" in job.told(), 60)
    job.restart()
    job.wait(lambda: len(job.losses(1)) > 2, 90)
    assert min(job.losses(1)) == 21
    slurm.kill_tasks(NODES[1])
    job.wait(lambda: job.state() in (*ENDED, "PENDING"), 60)
    assert job.state() == "FAILED"
    assert "got no further than iteration 20" in job.told()
    errors = [line for log in job.run.glob("logs/*-1/rank-*.log") for line in log.read_text().splitlines()]
    assert any(line.startswith("error: rank 0 of 2 on host ") for line in errors)
    slurm.wait_for_nodes()


@pytest.mark.long
def test_time_limit_saves_requeues_and_resumes(slurm, tmp_path):
    """Slurm signals up to a minute before the time that --signal names."""
    job = Job(slurm, tmp_path, ENDLESS, ENDLESS, "--time=2", "--signal=TERM@20")
    job.wait(lambda: "requeueing" in job.told(), 150)
    first = job.losses(0)
    assert job.saved() == max(first) and "DUE TO TIME LIMIT" not in job.told()
    job.restart()
    job.wait(lambda: len(job.losses(1)) > 2, 90)
    job.cancel()
    assert min(job.losses(1)) == max(first) + 1


@pytest.mark.long
def test_tags_job_selects_data(slurm, tmp_path):
    """The command of slurm/README.md, which ended for want of a tokenizer."""
    tokenizer, pool, log = tmp_path / "tokenizer", tmp_path / "pool.jsonl", tmp_path / "job.log"
    train = ["tools/train_tokenizer.py", "--type", "byte-level", "--output", str(tokenizer)]
    subprocess.run([sys.executable, *train], cwd=ROOT, check=True, capture_output=True)
    texts = [f"A text about a {subject} {number}." for number in range(30) for subject in ("cat", "river", "house")]
    pool.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "target.jsonl").write_text(json.dumps({"text": "A house near a river."}) + "\n")
    options = f"--work {tmp_path}/tags --input {pool} --target {tmp_path}/target.jsonl --budget 20%".split()
    cluster = str(cluster_file(tmp_path, str(tokenizer)))
    slurm("sbatch", "--wait", f"--output={log}", "slurm/preprocess_tags.sh", "--cluster", cluster, "--", *options)
    assert (tmp_path / "tags/blend/blend.txt").exists(), log.read_text()[-2000:]
    slurm.wait_for_nodes()
