import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from megatron.training import arguments  # noqa: E402

from megatron_ksa.platform import trainer_defaults  # noqa: E402
from megatron_ksa.training.arguments import install_arguments  # noqa: E402


@pytest.fixture(scope="module")
def megatron_flags():
    """This project's flags on Megatron's parser, for the tests of a module."""
    plain = arguments.add_megatron_arguments
    install_arguments(trainer_defaults())
    yield
    arguments.add_megatron_arguments = plain
