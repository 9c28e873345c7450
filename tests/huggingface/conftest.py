import functools
import sys
from pathlib import Path

import pytest
from warm import run_script

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def flags(megatron_flags):
    """Every conversion needs the trainer's parser."""


@pytest.fixture(scope="session")
def to_megatron():
    """Import `source` into the new folder `output`."""
    from megatron_ksa.huggingface.importer import import_checkpoint

    def convert(source: Path, output: Path, **settings) -> Path:
        output.mkdir(parents=True)
        import_checkpoint(source, output, **settings)
        return output

    return convert


@pytest.fixture(scope="session")
def to_huggingface():
    """Export `source` into the new folder `output`."""
    from megatron_ksa.checkpoint.load import find_checkpoint
    from megatron_ksa.huggingface.exporter import export_checkpoint
    from megatron_ksa.platform.process import prepare_process

    # As the command does: what is read is compared with its sums.
    prepare_process(fsdp2=False)

    def convert(source: Path, output: Path, **settings) -> Path:
        output.mkdir(parents=True)
        export_checkpoint(find_checkpoint(source), output, **settings)
        return output

    return convert


@pytest.fixture(scope="session")
def command():
    """Run tools/convert_checkpoint.py."""

    return functools.partial(run_script, "tools/convert_checkpoint.py")
