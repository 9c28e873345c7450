"""Values of a `config.json`: each is checked for its type when it is read, and a wrong one is refused by its name."""

import math
from pathlib import Path

from megatron_ksa.errors import UsageError

# What stands for "no default": the key must be there.
REQUIRED = object()


class Fields:
    """The keys of one JSON object.

    Args:
        values: the object.
        path: its file, for messages.
        within: where in the file it stands, for messages.
        defaults: what an absent key means, where a method is not told.
    """

    def __init__(
        self, values: dict[str, object], path: Path, within: str = "", defaults: dict[str, object] | None = None
    ) -> None:
        self.values, self.path = values, path
        self._within, self._defaults = f" of {within}" if within else "", defaults or {}

    def get(self, key: str, default: object = REQUIRED) -> object:
        """The value of a key, whatever it is.

        Args:
            default: for an absent key, where `defaults` does not name it; null is a value.

        Raises:
            UsageError: an absent key without a default.
        """
        if key in self.values:
            return self.values[key]
        if key in self._defaults:
            return self._defaults[key]
        if default is REQUIRED:
            raise UsageError(f"{self.path} lacks the key {key!r}{self._within}")
        return default

    def size(self, key: str, default: object = REQUIRED) -> int:
        """An integer of 1 or more."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refused(key, "a positive integer is needed")
        return value

    def flag(self, key: str, default: object = REQUIRED) -> bool:
        """True or false: the text "false" is neither."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false is needed")
        return value

    def number(self, key: str, default: object = REQUIRED) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if not is_number(value) or not value > 0:
            raise self.refused(key, "a number above 0 is needed")
        return value

    def whole(self, key: str, default: object = REQUIRED, flag: str = "") -> int:
        """An integer of 1 or more, which may be written as a float."""
        value = self.number(key, default)
        if value != int(value):
            raise self.refused(key, f"an integer is needed{flag}")
        return int(value)

    def refused(self, key: str, rule: str) -> UsageError:
        """The error that names a key, its value and the rule."""
        return UsageError(f"{self.path}: {key}{self._within} is {self.get(key)!r}, {rule}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of 400 digits
        return False
