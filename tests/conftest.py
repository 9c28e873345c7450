import os
import sys
from pathlib import Path

import pytest

# tests/compare.py and tests/trainer.py are shared by every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from docstrings_once import read_docstrings_once  # noqa: E402
from groups import group  # noqa: E402

# Triton chooses between compiler and interpreter when it is imported; without a GPU kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform  # noqa: E402

# Megatron's random-state tracker and recompute ask for CUDA; the trainer activates this platform in the same way.
activate_cpu_platform()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """A group of pytest-xdist for every test that has none, before a worker reads the groups.

    Workers take groups in the order of collection (`--no-loadscope-reorder`): the ranks' group, the longest, is first.
    """
    groups = {path: group(path) for path in {item.path for item in items}}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(groups[item.path]))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: groups[item.path] != "world")


def pytest_collection_finish():
    """The tests' modules are imported now, and Megatron's parser with them."""
    read_docstrings_once()


@pytest.fixture(scope="module")
def megatron_flags():
    """This project's flags on Megatron's parser, for the tests of a module."""
    from megatron_ksa.platform import trainer_defaults
    from megatron_ksa.training.arguments import install_arguments

    with install_arguments(trainer_defaults()):
        yield
