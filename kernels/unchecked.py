"""What no GPU has run yet in its final form: on a GPU it is off until `take_unchecked` asks for it.

A kernel or fusion that has run in Triton's interpreter and been compiled is named here first, and leaves when a GPU has
checked it (`tests/gpu/run_parts.py one_gpu OUT kernels checks`).
"""

# Names of fusions, all of which megatron_ksa/config/kernels.py describes; `dispatch.fuses` asks about them.
FUSIONS: frozenset[str] = frozenset()
# Names of ops (`dispatch.by_device`).
OPS: frozenset[str] = frozenset({"softmax merge"})
_taken = False


def take_unchecked(taken: bool = True) -> None:
    """Take unchecked kernels and fusions on a GPU from now on; with `taken` False, leave them off again."""
    global _taken
    _taken = taken


def is_taken(name: str) -> bool:
    """Whether a GPU takes the fusion or the kernels of the op of this name: they are checked, or were asked for."""
    return _taken or name not in FUSIONS | OPS
