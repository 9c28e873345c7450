"""A script whose commands are forks of its process, which has the trainer's imports: 5 s of processor time less each.

    commands_in_forks.py SCRIPT ARGUMENT...    # run by warm.run_script

Its commands are Python scripts and torchrun, called by `subprocess.run` or `run_ranks`; their time is not limited.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from warm_server import run  # noqa: E402

from megatron_ksa.platform import ranks  # noqa: E402
from megatron_ksa.platform.ports import free_port  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run"]
in_a_process = subprocess.run


def forked(
    command: list[object], *, cwd: Path | None = None, env: dict[str, str] | None = None, stdout: int | None = None,
    stderr: int | None = None, check: bool = False, **others: object,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`subprocess.run`; a Python script, alone or as torchrun's ranks on this machine, runs in forks.

    Args:
        stdout: where it is given, as `stderr`, the result has what was printed.

    Raises:
        SystemExit: torchrun does not know its flags.
    """
    python, *words = map(str, command)
    torchrun = words[:2] == TORCHRUN
    if python != sys.executable or (words[0].startswith("-") and not torchrun):
        return in_a_process(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, check=check, **others)
    if others.get("capture_output"):
        stdout = stderr = subprocess.PIPE
    environment, size = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}, 0
    if torchrun:
        from torch.distributed.run import get_args_parser

        launcher = get_args_parser().parse_args(words[2:])
        words, size = [launcher.training_script, *launcher.training_script_args], int(launcher.nproc_per_node)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sys.stdout.flush()
    # Not a TemporaryDirectory: each fork would remove it at its end.
    printed = tempfile.mkdtemp()
    kept = {name: Path(printed) / name for name, kind in (("out", stdout), ("error", stderr)) if kind is not None}
    request = {
        "script": str(Path(cwd or "").absolute() / words[0]), "arguments": words[1:], "environment": environment,
        "folder": str(cwd or Path.cwd()), "ranks": size, "out": "/dev/stdout", "error": "/dev/stderr",
    } | {name: str(path) for name, path in kept.items()}  # fmt: skip
    codes, first = run(request)
    texts = {name: path.read_text() for name, path in kept.items()}
    shutil.rmtree(printed)
    code = 0 if first is None else codes[first]
    done = subprocess.CompletedProcess(command, code, texts.get("out"), texts.get("error"))
    if check:
        done.check_returncode()
    return done


def forked_ranks(
    script: list[str], count: int, *, environment: dict[str, str] | None = None, **_: object
) -> subprocess.CompletedProcess:
    """`megatron_ksa.platform.ranks.run_ranks`."""
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", count, *script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forked(command, env={**os.environ, **(environment or {})}, **pipes)


def main() -> None:
    """Run the script as this process's main module."""
    subprocess.run, ranks.run_ranks = forked, forked_ranks
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
