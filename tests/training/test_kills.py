"""Kills of the launcher and of loading workers, cut data files, full file systems: named, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions import processes_of
from trainer import MODEL, TRAINING, launch, steps, write_documents
from two_ranks import ENTRY, ITERATIONS, SAVING, TwoRanks

from megatron_ksa.checkpoint.integrity import damage, newest_whole
from megatron_ksa.platform.ports import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and gradient norms of every iteration, and the folder with the checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch([(folder / "record.json", f"{SAVING} --save {folder}/saved")], processes=2)
    assert (folder / "record.json").exists(), done.stderr[-3000:]
    return steps(folder / "record.json"), folder / "saved"


def assert_resumes(folder: Path, saved: Path, undisturbed: dict, before: Path) -> None:
    """The same command again goes on to the end, with the numbers of the run that nothing happened to."""
    run = TwoRanks(folder, folder / "resumed.json", f"{SAVING} --save {saved} --load {saved}")
    assert run.wait(300) == [0, 0], run.logs[0].read_text()[-3000:]
    resumed = steps(folder / "resumed.json")
    assert max(resumed) == ITERATIONS and min(resumed) > 1
    for iteration, values in {**steps(before), **resumed}.items():
        assert values == pytest.approx(undisturbed[iteration], rel=1e-7), iteration


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_file_that_is_cut_is_named(workers, tmp_path):
    """A `.bin` cut during training was a SIGBUS without a word, in a loading worker one about shared memory."""
    flags = f"--train-iters 100000 --num-workers {workers}"
    run = TwoRanks(tmp_path, tmp_path / "record.json", flags)
    run.until(2)
    os.truncate(tmp_path / "documents.bin", 100)
    codes = run.wait(90)
    errors = [line for rank in range(2) for line in run.errors(rank)]
    assert 2 in codes and all(code > 0 for code in codes), (codes, run.logs[0].read_text()[-2000:])
    assert any(f"error: {tmp_path}/documents.bin is shorter than when training started" in line for line in errors)


@pytest.mark.long
def test_killed_launcher(undisturbed, tmp_path):
    """A launcher that was killed left its ranks training; a run that was started again wrote beside them."""
    numbers, _ = undisturbed
    write_documents(tmp_path / "documents")
    flags = [*MODEL, *TRAINING, "--data-path", str(tmp_path / "documents"), *SAVING.split(), "--save",
             str(tmp_path / "saved")]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps([{"record": str(tmp_path / "record.json"), "flags": flags}]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, str(free_port()), str(ENTRY), str(tmp_path / "runs.json")], stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 200
    while time.monotonic() < end and not (tmp_path / "saved/latest_checkpointed_iteration.txt").exists():
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "is gone" in (tmp_path / "log").read_text()
    assert_resumes(tmp_path, tmp_path / "saved", numbers, tmp_path / "record.json")


@pytest.mark.long
def test_killed_loading_worker(undisturbed, tmp_path):
    numbers, _ = undisturbed
    run = TwoRanks(tmp_path, tmp_path / "record.json", f"{SAVING} --save {tmp_path}/saved --num-workers 1")
    run.until(4)
    workers = [process for process in processes_of(run.ranks[0].pid) if process != run.ranks[0].pid]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    codes = run.wait(90)
    assert codes[0] == 1 and 0 not in codes, codes
    (line,) = run.errors(0)
    assert line.startswith("error: rank 0 of 2 on host ") and "DataLoader worker" in line
    assert_resumes(tmp_path, tmp_path / "saved", numbers, tmp_path / "record.json")


@pytest.fixture
def small_disk(undisturbed, tmp_path):
    """A file system for three checkpoints and a half; skipped where mounting is not allowed."""
    _, saved = undisturbed
    size = sum(path.stat().st_size for path in (saved / "iter_0000002").iterdir())
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 3.5)}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("save", ["", "--async-save"])
def test_file_system_that_fills_up(save, undisturbed, small_disk, tmp_path):
    """A save on a full disk ended in a traceback of a library; the line names the folder and what is left."""
    numbers, _ = undisturbed
    saved = small_disk / "saved"
    run = TwoRanks(tmp_path, tmp_path / "record.json", f"{SAVING} --save {saved} {save}")
    codes = run.wait(300)
    lines = [line for rank in range(2) for line in run.errors(rank)]
    assert 0 not in codes and lines, run.logs[0].read_text()[-3000:]
    whole = newest_whole(saved)
    assert whole is not None and whole >= 2 and damage(saved / f"iter_{whole:07d}") is None
    said = f"cannot be written: No space left on device; iteration {whole} is whole and --load {saved} takes it"
    assert any(line.startswith(f"error: --save {saved}: ") and said in line for line in lines), lines
    assert "Traceback" not in run.logs[0].read_text().split("error: --save")[-1]
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    assert_resumes(tmp_path, saved, numbers, tmp_path / "record.json")
