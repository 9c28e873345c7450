"""The engines give the same results in the same order, bounded in memory, and a failure costs one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_tasks import die, own_process, refuse, slow_square
from raw_pool import write_pool

from megatron_ksa.data_tools.tags.engine import TASKS_IN_FLIGHT, Engine
from megatron_ksa.data_tools.tags.pipeline import COMMANDS, Pipeline
from megatron_ksa.data_tools.tags.step import Context
from megatron_ksa.errors import UsageError


def files_by(engine: Engine, folder: Path, pool: Path) -> dict[str, bytes]:
    """What the steps before sampling write."""
    steps = [*COMMANDS["tag"].steps, *COMMANDS["tree"].steps]
    settings = {config: config() for step in steps for config in step.settings.values()}
    Pipeline(Context(folder, engine, (pool,)), settings, lambda line: None).run(steps)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.name[0] != "." and path.is_file()
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(Engine(workers=workers).map(slow_square, range(20))) == [number**2 for number in range(20)]


def test_work_is_shared_and_few_tasks_are_taken_ahead():
    taken = []
    results = Engine(workers=2).map(own_process, (taken.append(n) or n for n in range(100)))
    processes = {next(results) for _ in range(8)}
    assert len(processes) == 2 and os.getpid() not in processes
    assert len(taken) <= 8 + 2 * TASKS_IN_FLIGHT
    results.close()


@pytest.mark.parametrize(("function", "message"), [(die, "--workers 2: a worker died"), (refuse, "--number 0: no")])
def test_a_failure_in_a_worker_is_one_line(function, message):
    with pytest.raises(UsageError, match=message):
        list(Engine(workers=2).map(function, range(8)))


@pytest.mark.parametrize(
    ("arguments", "message"), [(("cluster", 1), "--engine cluster"), (("local", 0), "--workers 0")]
)
def test_bad_settings(arguments, message):
    with pytest.raises(UsageError, match=message):
        Engine(*arguments)


def test_ray_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="--engine ray needs a package: pip install ray"):
        Engine("ray")


def test_workers_end_with_a_killed_parent():
    """They used to wait for tasks for ever: nobody else tells them."""
    program = (
        "import sys; from engine_tasks import own_process; from megatron_ksa.data_tools.tags.engine import Engine\n"
        "if __name__ == '__main__':\n"
        "    results = Engine(workers=2).map(own_process, range(10**6))\n"
        "    print(*{next(results) for _ in range(8)}, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [int(process) for process in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(workers) == 2
    for _ in range(100):
        alive = [worker for worker in workers if Path(f"/proc/{worker}").exists() and "Z (" not in _state(worker)]
        if not alive:
            return
        time.sleep(0.1)
    for worker in alive:
        os.kill(worker, signal.SIGKILL)
    pytest.fail(f"{len(alive)} workers outlive their parent by 10 s")


@pytest.mark.slow
def test_an_interrupt_is_one_line(tmp_path):
    """Ctrl-C, which the terminal sends to workers too, printed over a hundred lines of tracebacks.

    It comes while the tool waits for its workers: their tasks are held until it was sent.
    """
    pool, tool = write_pool(tmp_path / "pool.jsonl"), Path(__file__).with_name("held_tool.py")
    run = subprocess.Popen(
        [sys.executable, tool, tmp_path / "work", "tag", "--input", pool, "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout.readline().startswith("read:")
    while not (tmp_path / "held").exists():
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    (tmp_path / "released").touch()
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and error.splitlines()[-1] == "interrupted: the same command continues"
    assert "Traceback" not in error and "Error" not in error
    assert {"records.jsonl", "manifest.json"} <= {path.name for path in (tmp_path / "work").iterdir()}
    assert not [path for path in (tmp_path / "work").iterdir() if path.name in ("run.lock", "tags.jsonl")]


def _state(process: int) -> str:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return "Z ("
    return next(line for line in status.splitlines() if line.startswith("State:"))


@pytest.fixture
def ray_engine(monkeypatch):
    ray = pytest.importorskip("ray", reason="--engine ray needs ray")
    # Ray's workers import `engine_tasks`, and ray itself from where this process has it.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    yield Engine("ray", 2)
    ray.shutdown()


@pytest.mark.slow
def test_every_engine_writes_the_same_bytes(tmp_path):
    pool = write_pool(tmp_path / "pool.jsonl", count=600)
    alone = files_by(Engine(), tmp_path / "one", pool)
    assert files_by(Engine(workers=2), tmp_path / "two", pool) == alone


@pytest.mark.slow
def test_ray_keeps_order_tells_mistakes_and_writes_the_same_bytes(tmp_path, ray_engine):
    assert list(ray_engine.map(slow_square, range(20))) == [number**2 for number in range(20)]
    with pytest.raises(UsageError, match="^--number 0: no$"):
        list(ray_engine.map(refuse, range(3)))
    with pytest.raises(UsageError, match="--engine ray: a worker"):
        list(ray_engine.map(die, range(3)))
    pool = write_pool(tmp_path / "pool.jsonl", count=600)
    assert files_by(ray_engine, tmp_path / "ray", pool) == files_by(Engine(), tmp_path / "one", pool)
