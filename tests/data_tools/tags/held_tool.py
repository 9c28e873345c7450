"""`tools/preprocess_tags.py`, whose workers hold the tasks of `tag` (`engine_tasks.held`).

Usage: held_tool.py WORK COMMAND...
"""

import runpy
import sys
from functools import partial
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_tags.py"
sys.path.append(str(TOOL.parents[1]))
from engine_tasks import held  # noqa: E402

from megatron_ksa.data_tools.tags.engine import Engine  # noqa: E402

if __name__ == "__main__":
    work, in_processes = Path(sys.argv[1]), Engine._in_processes
    Engine._in_processes = lambda engine, function, tasks: in_processes(engine, partial(held, work, function), tasks)
    sys.argv = [str(TOOL), *sys.argv[2:], "--work", str(work)]
    runpy.run_path(str(TOOL), run_name="__main__")
