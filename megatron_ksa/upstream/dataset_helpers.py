"""Megatron's compiled dataset helpers: the wheel ships them built, and no Makefile."""

from collections.abc import Callable

from megatron_ksa.upstream.patches import Patch


def _skip(build: Callable[[], None]) -> Callable[[], None]:
    """Nothing to do where the compiled helpers import; elsewhere Megatron builds them as before."""
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return build
    return lambda: None


PATCHES = (
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        _skip,
        why="the wheel lacks the Makefile of helpers that it ships built, and the trainer ends where `make` fails",
        expects="()",
    ),
)
