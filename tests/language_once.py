"""Triton's interpreter replaces the language's functions at every call of a device function: once a launch is enough.

A launch replaces them and restores them at its end; each of its thousands of device functions looked through the whole
language again, a third of the time of a kernel's test.
"""

import functools
import sys
from types import FunctionType

MODULE = "triton.runtime.interpreter"


def patch_language_once() -> None:
    """Skip what a launch that still runs has replaced, where Triton's interpreter is imported."""
    interpreter = sys.modules.get(MODULE)
    if interpreter is None or getattr(interpreter, "patches_once", False):
        return
    original, language = interpreter._patch_lang, interpreter.tl
    # By identity: modules whose functions are replaced now.
    replaced: set[int] = set()

    @functools.wraps(original)
    def patch(fn: FunctionType) -> object:
        seen = {id(value) for value in fn.__globals__.values() if value is language or value is language.core}
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()
        scope, new = original(fn), seen - replaced
        replaced.update(new)
        restore = scope.restore

        def restored() -> None:
            restore()
            replaced.difference_update(new)

        scope.restore = restored
        return scope

    interpreter._patch_lang, interpreter.patches_once = patch, True
