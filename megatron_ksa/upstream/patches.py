"""Replacements of something in Megatron or torch: declared, checked against what they were written for, undone."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from megatron_ksa.errors import UsageError

_MISSING = object()
ABSENT = "absent"
# Defaults that mean the same wherever they are printed; of another default the signature gives the type.
PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class Patch:
    """One replacement.

    Attributes:
        target: `module:name`, `module:Class.name` or `module:dictionary.key`.
        make: called with what stands there; returns what takes its place (a wrapper has `functools.wraps` of it).
        why: what is wrong or missing without it.
        expects: `signature` of the target in Megatron 0.19.2 or torch, for which `make` was written.
        fixed_in: the version from which on it can go; None where no version is known.
    """

    target: str
    make: Callable[..., Any]
    why: str
    expects: str
    fixed_in: str | None = None

    def given(self, *values: object) -> "Patch":
        """This patch where `make` also takes what only a run knows: `make(original, *values)`."""
        make = self.make
        return dataclasses.replace(self, make=lambda original: make(original, *values))


def signature(value: Any) -> str:
    """Names, kinds and defaults of a callable's parameters, without annotations; the type's name of anything else."""
    if value is _MISSING:
        return ABSENT
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return type(value).__name__
    parameters = []
    for parameter in found.parameters.values():
        default = parameter.default
        if default is not parameter.empty and not isinstance(default, PLAIN):
            # Shown bare, not as the text of a string.
            default = _Bare(type(default).__name__)
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(parameters))


class _Bare(str):
    def __repr__(self) -> str:
        return str(self)


class _Place:
    """Where a target stands: the module, class or dictionary that holds it, and its name there."""

    def __init__(self, target: str) -> None:
        module, _, path = target.partition(":")
        *classes, self.name = path.split(".")
        self.owner: Any = importlib.import_module(module)
        for name in classes:
            self.owner = getattr(self.owner, name)

    def get(self) -> Any:
        return self.own() if isinstance(self.owner, dict) else getattr(self.owner, self.name, _MISSING)

    def own(self) -> Any:
        """What is stored under the name itself: the descriptor of a static method, nothing where it is inherited."""
        stored = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return stored.get(self.name, _MISSING)

    def set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner.pop(self.name, None)
            if value is not _MISSING:
                self.owner[self.name] = value
        elif value is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


def check(patch: Patch) -> _Place:
    """The place of a patch's target.

    Raises:
        UsageError: the target does not exist, or has another signature than the patch was written for.
    """
    try:
        place = _Place(patch.target)
    except (ImportError, AttributeError):
        raise UsageError(_mismatch(patch, ABSENT)) from None
    if (found := signature(place.get())) != patch.expects:
        raise UsageError(_mismatch(patch, found))
    return place


def _mismatch(patch: Patch, found: str) -> str:
    return (
        f"the replacement of {patch.target} ({patch.why}) was written for {patch.expects}, here it is {found}: "
        f"install the versions of constraints.txt, or adapt the patch in megatron_ksa/upstream"
    )


class Applied:
    """Replacements in place; `undo`, or the end of a `with` block, puts back what stood there."""

    def __init__(self) -> None:
        self._undo: list[tuple[_Place, Any]] = []

    def replace(self, patch: Patch, place: _Place) -> None:
        own = place.own()
        made = patch.make(place.get())
        self._undo.append((place, own))
        place.set(staticmethod(made) if isinstance(own, staticmethod) else made)

    def undo(self) -> None:
        """Put everything back, the last first; a second call does nothing."""
        while self._undo:
            place, own = self._undo.pop()
            place.set(own)

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()


def apply(patches: Iterable[Patch]) -> Applied:
    """Check every patch, then put all of them in place: all or none.

    Returns:
        What undoes them; a context manager.

    Raises:
        UsageError: from `check`, before anything is changed.
    """
    places = [(patch, check(patch)) for patch in patches]
    applied = Applied()
    try:
        for patch, place in places:
            applied.replace(patch, place)
    except BaseException:
        applied.undo()
        raise
    return applied


_lasting: set[Patch] = set()


def apply_for_good(patches: Iterable[Patch]) -> None:
    """`apply` for as long as the process lives; those that are in place already stay as they are."""
    new = [patch for patch in patches if patch not in _lasting]
    apply(new)
    _lasting.update(new)
