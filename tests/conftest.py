import gc
import os
import signal
import sys
from pathlib import Path

import pytest

# tests/compare.py and tests/trainer.py are shared by every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))

from docstrings_once import read_docstrings_once  # noqa: E402
from groups import group, place  # noqa: E402
from interpreter_once import interpret_once  # noqa: E402


def pytest_configure(config):
    """What every process that runs tests needs before it imports their modules.

    The process that deals tests out to workers of pytest-xdist runs none: without torch it is there 4 s earlier.

    Raises:
        UsageError: a conftest.py of a folder has imported Megatron, which must find the CPU platform.
    """
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    # What a shell starts in the background ignores Ctrl-C, and so would the programs that tests send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Until everything is imported: what is imported stays, and the collector would visit it again and again.
    gc.disable()
    if "megatron" in sys.modules:
        raise pytest.UsageError("a conftest.py imports Megatron before the CPU platform is there: import in fixtures")
    import hypothesis
    import torch

    # The same examples in every run; HYPOTHESIS_PROFILE=default looks for others.
    hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

    # Triton chooses between compiler and interpreter when it is imported; without a GPU kernels are interpreted.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from gloo_once import share_device

    from megatron_ksa.kernels.unchecked import take_unchecked
    from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform

    # Tests are what checks them.
    take_unchecked()
    # Megatron's random-state tracker and recompute ask for CUDA; the trainer activates this platform in the same way.
    activate_cpu_platform()
    share_device()


def pytest_itemcollected(item):
    """A group of pytest-xdist for every test that has none, before a worker of pytest-xdist reads the groups."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(group(item.path)))


def pytest_make_parametrize_id(val, argname):
    """A short name for a long value: names go through every report."""
    return f"long {argname}" if isinstance(val, str | bytes) and len(val) > 200 else None


def pytest_collection_modifyitems(config, items):
    """Workers take groups in the order of collection (`--no-loadscope-reorder`): the longest first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.path))


def pytest_collection_finish(session):
    """The tests' modules are imported now, Megatron's parser and Triton with them; pytest-xdist has named the groups.

    Raises:
        UsageError: it has not. Then tests are dealt out one by one, and every worker makes every module's fixtures.
    """
    read_docstrings_once()
    interpret_once()
    if "megatron" in sys.modules:
        # A test that configures the trainer does this to its process; whichever tests ran before, Megatron is the same.
        from megatron_ksa.platform.process import prepare_process

        prepare_process(fsdp2=False)
    grouped = hasattr(session.config, "workerinput") and session.config.getoption("loadgroup")
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not group tests with this pytest: install those of constraints.txt")
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown(item):
    """Workers share a GPU: none keeps what a large test took."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def megatron_flags():
    """This project's flags on Megatron's parser, for the tests of a module."""
    from megatron_ksa.platform import trainer_defaults
    from megatron_ksa.training.arguments import install_arguments

    with install_arguments(trainer_defaults()):
        yield
