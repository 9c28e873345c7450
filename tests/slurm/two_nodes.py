"""A real Slurm of two nodes on this machine: munge, slurmctld and two slurmd in a folder of their own.

They are installed where that is allowed. Nodes are named by addresses, so that ranks reach them by their names.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megatron_ksa.platform.ports import free_port

ROOT = Path(__file__).parents[2]
HOST, CPUS = socket.gethostname().split(".")[0], os.cpu_count()
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0
MpiDefault=none
ReturnToService=1
KillWait=20
SlurmdTimeout=10
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def require_slurm() -> None:
    """Install Slurm where it is missing and that is allowed; otherwise skip the test, with the reason."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the job has two ranks, this machine one CPU core")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"{missing[0]} is not installed and there is no apt-get to install slurm-wlm and munge")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        try:
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            pytest.skip(f"apt-get {command[0]} takes more than 240 s")
        if done.returncode:
            pytest.skip(f"apt-get {command[0]} fails: {' '.join(done.stderr.split())[-200:]}")


class Slurm:
    """The daemons and Slurm's commands.

    Attributes:
        environment: that of a process that calls Slurm's commands.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, configuration = folder, folder / "slurm.conf"
        (folder / "state").mkdir()
        lines = []
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            lines.append(f"NodeName={node} NodeHostname={HOST} NodeAddr={node} Port={free_port()} CPUs={CPUS}\n")
        configuration.write_text(
            CONFIGURATION.format(host=HOST, folder=folder, controller_port=free_port()) + "".join(lines)
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**inherited, "SLURM_CONF": str(configuration)}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start all daemons and wait for the nodes."""
        folder = self._folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *munge)
        self._start("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def kill_tasks(self, node: str) -> None:
        """SIGKILL to what runs on a node for a job."""
        _kill(_tasks(node))

    def kill_node(self, node: str) -> None:
        """As if its power failed: SIGKILL to its daemon as well, and to the managers of its job steps."""
        daemon, tasks = self._daemons.pop(node), _tasks(node)
        _kill({daemon.pid, *tasks, *tasks.values()})
        daemon.wait()

    def __call__(self, *command: str) -> str:
        """What a command of Slurm prints; called in the repository's root."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for_nodes(self, seconds: float = 40) -> None:
        """Wait until all nodes are idle."""
        deadline, states = time.monotonic() + seconds, ""
        while time.monotonic() < deadline and all(daemon.poll() is None for daemon in self._daemons.values()):
            listed = subprocess.run(
                ["sinfo", "-hN", "-o", "%T"], env=self.environment, capture_output=True, text=True, check=False
            )
            states = listed.stdout.split()
            if states == ["idle"] * len(NODES):
                return
            time.sleep(0.5)
        logs = sorted(self._folder.glob("*.log")) + sorted(self._folder.glob("*.out"))
        raise RuntimeError(f"Slurm's nodes are {states}:\n" + "".join(path.read_text()[-1500:] for path in logs))

    def stop(self) -> None:
        """End the daemons."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, name: str, *command: str) -> None:
        with open(self._folder / f"{name}.out", "a") as out:
            self._daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)
        time.sleep(0.5)


def _tasks(node: str) -> dict[int, int]:
    """Tasks and batch scripts on a node, with the manager of their step."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURMD_NODENAME={node}".encode() in (path / "environ").read_bytes().split(b"\0"):
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found[int(path.name)] = parent
        except OSError:  # it has ended meanwhile
            continue
    return found


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Daemons with their files in an empty folder; they end with the body."""
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
