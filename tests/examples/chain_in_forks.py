"""examples/ksa_from_dense/run.py with its commands as forks of this process: run it by `warm.Started`.

    chain_in_forks.py NAME COUNT FLAG...    # flags of run.py

The process that is about to give a file or folder below --work the name NAME for the COUNT-th time is killed, and with
it the chain and all that it has started; no name is NAME where it is `-`. The last line is the processor seconds of the
chain and its commands.
"""

import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands_in_forks import forked

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "ksa_from_dense" / "run.py"


class Killer:
    """An audit hook, which forks inherit: the moment is the same in every run, whatever the machine does."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.left = name, count

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "os.rename" and os.fspath(arguments[1]).endswith(f"/{self.name}"):
            self.left -= 1
            if not self.left:
                os.killpg(0, signal.SIGKILL)


def main() -> None:
    name, count, *flags = sys.argv[1:]
    sys.addaudithook(Killer(name, int(count)))
    subprocess.run = forked
    sys.argv = [str(SCRIPT), *flags]
    sys.path[0] = str(SCRIPT.parent)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(f"{sum(each.ru_utime + each.ru_stime for each in used):.1f} processor seconds", flush=True)


if __name__ == "__main__":
    main()
