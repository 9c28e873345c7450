"""Imported before the package by the commands here: one line and exit code 2 where something that they need is missing.

A script has its own folder on Python's path and not this one, which it appends.
"""

import sys
from importlib.util import find_spec

NEEDED = ("megatron_ksa", "megatron", "torch", "numpy", "tqdm")

missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    line = f"error: {missing[0]} is not installed here: run `pip install -e '.[train]'` in the repository"
    print(line, file=sys.stderr)
    sys.exit(2)
