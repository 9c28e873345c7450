"""Megatron's compiled dataset helpers: the wheel ships them built, and no Makefile."""

from megatron.core.datasets import utils


def skip_helpers_build() -> None:
    """Let the trainer skip `make` where the compiled helpers import; elsewhere Megatron builds them as before."""
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None
