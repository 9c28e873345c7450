"""What a selection must and must not hold: records that are always in it, and bounds for sources and branches.

A bound counts in the budget's unit. Greedy stays greedy: what may no longer be chosen is closed, once and for all, so
lazy evaluation holds. With quotas of sources alone, in instances, the value is at least half of the optimum (a
partition matroid, Fisher et al. 1978).
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

KINDS = ("source", "branch")
# Characters of a value that a message repeats.
SHOWN = 200
# Names may have commas: a bound ends at one that another bound follows.
_BETWEEN_BOUNDS = re.compile(r",\s*(?=(?:source|branch):|$)")


@dataclass(frozen=True)
class Bound:
    """One bound as a flag has it: `amount` in the budget's unit, or a share of the budget."""

    flag: str
    kind: str
    name: str
    amount: float
    is_share: bool

    def of(self, budget: float) -> float:
        """The bound in the budget's unit."""
        return self.amount * budget if self.is_share else self.amount


def parse_bounds(flag: str, text: str) -> list[Bound]:
    """The bounds in a flag's value, such as `source:flan=20%,branch:chess=100`.

    Raises:
        UsageError: another form, or a name given twice.
    """
    found: list[Bound] = []
    for part in filter(None, (part.strip() for part in _BETWEEN_BOUNDS.split(text))):
        head, _, value = part.rpartition("=")
        kind, _, name = head.partition(":")
        is_share = value.endswith("%")
        try:
            amount = float(value.removesuffix("%")) / (100 if is_share else 1)
        except ValueError:
            amount = -1.0
        if kind not in KINDS or not name or not 0 <= amount < float("inf") or (is_share and amount > 1):
            raise UsageError(
                f"{flag} {part[:SHOWN]}: give source:NAME=AMOUNT or branch:NAME=AMOUNT, a number or a share (5%)"
            )
        if any((bound.kind, bound.name) == (kind, name) for bound in found):
            raise UsageError(f"{flag} {part[:SHOWN]}: {kind} {name[:SHOWN]} is given twice")
        found.append(Bound(flag, kind, name, amount, is_share))
    return found


@dataclass(frozen=True)
class ConstraintSettings:
    """What the selection must and must not hold.

    Raises:
        UsageError: a bound that cannot be read.
    """

    quota: str = option(
        "", "At most, by source or branch: 'source:flan=20%,branch:chess=100', shares being of the budget.",
        flag="--quota",
    )  # fmt: skip
    floor: str = option("", "At least, as --quota.", flag="--floor")
    always: str | None = option(
        None,
        "Always choose these records: a file with an id (as in records.jsonl) a line, or JSONL with ids.",
        flag="--always",
    )

    def __post_init__(self) -> None:
        parse_bounds("--quota", self.quota)
        parse_bounds("--floor", self.floor)
        # Path.is_file raises for a name that is too long.
        if self.always is not None and not os.path.isfile(self.always):
            raise UsageError(f"--always {self.always[:SHOWN]}: no such file")

    @property
    def bounds(self) -> list[Bound]:
        """All bounds."""
        return parse_bounds("--quota", self.quota) + parse_bounds("--floor", self.floor)

    def always_ids(self) -> list[str]:
        """Ids of the records that are always chosen.

        Raises:
            UsageError: a file that cannot be read, a line of JSONL without an id.
        """
        if self.always is None:
            return []
        path = Path(self.always)
        # Not str.splitlines: an id may hold U+2028 and its like.
        lines = [line.strip(" \t\r") for line in read_small(path, "--always", limit=LIST_BYTES).split("\n")]
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
        if path.suffix != ".jsonl":
            return list(dict.fromkeys(line for _, line in numbered))
        return list(dict.fromkeys(_id_of(line, f"--always {path}:{number}") for number, line in numbered))


def _id_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: no JSON ({error}); a file of ids alone has another suffix than .jsonl") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UsageError(f"{place}: no object with an id that is text, as in records.jsonl")
    return row["id"]


@dataclass(frozen=True)
class Limit:
    """Bounds of one source or branch.

    Args:
        member: bool [instances].
        least, most: in the budget's unit.
        name: for errors.
    """

    member: np.ndarray
    least: float = 0.0
    most: float = np.inf
    name: str = "a group"


@dataclass(frozen=True)
class Rules:
    """What one selection must hold.

    Args:
        first: int64 [rows], chosen before any other, in this order.
        limits: of sources and branches.
    """

    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    limits: tuple[Limit, ...] = ()

    def __bool__(self) -> bool:
        return bool(len(self.first) or self.limits)

    def check(self, budget: float, cost: np.ndarray) -> None:
        """Check that they can be met.

        Args:
            cost: [instances], in the budget's unit.

        Raises:
            UsageError: they cannot.
        """
        needed = float(cost[self.first].sum())
        if needed > budget:
            raise UsageError(f"--always: its records need {needed:,.0f} of a --budget of {budget:,.0f}")
        # What is always chosen counts towards the floors and the quotas.
        held = [float(cost[self.first][limit.member[self.first]].sum()) for limit in self.limits]
        for limit, amount in zip(self.limits, held, strict=True):
            if amount > limit.most:
                raise UsageError(
                    f"--always: its records have {amount:,.0f} of {limit.name}, more than its --quota {limit.most:,.0f}"
                )
        missing = [max(limit.least - amount, 0.0) for limit, amount in zip(self.limits, held, strict=True)]
        if needed + sum(missing) > budget:
            needed += sum(missing)
            raise UsageError(f"--floor: needs {needed:,.0f} of a --budget of {budget:,.0f}, --always included")


class Ledger:
    """What may still be chosen as a selection grows.

    Args:
        cost: [instances], in the budget's unit.
        budget: what may be spent.
    """

    def __init__(self, rules: Rules, cost: np.ndarray, budget: float) -> None:
        self.open = np.ones(len(cost), bool)
        self.limits, self._cost, self._left = rules.limits, cost, budget
        self._spent = [0.0] * len(rules.limits)
        # Bounds close the dearest first; each instance is closed once, so that closing costs little for a choice.
        self._members = [_Dearest(np.flatnonzero(limit.member), cost) for limit in rules.limits]
        self._needy, self._others = -1, _Dearest(np.empty(0, np.int64), cost)
        self._close()

    def take(self, row: int) -> bool:
        """Count a row that is chosen; returns whether others were closed by it."""
        self.open[row] = False
        self._left -= self._cost[row]
        if not self.limits:
            return False
        for number, limit in enumerate(self.limits):
            if limit.member[row]:
                self._spent[number] += self._cost[row]
        return self._close()

    def _close(self) -> bool:
        closed, rest = False, self._left
        needy: list[np.ndarray] = []
        for members, limit, spent in zip(self._members, self.limits, self._spent, strict=True):
            closed |= members.close(limit.most - spent, self.open)
            if spent < limit.least:
                rest -= limit.least - spent
                needy.append(limit.member)
        # What is left is kept for the floors; a floor that is reached needs nothing any more.
        if len(needy) != self._needy:
            outside = ~np.any(needy, axis=0) if needy else np.empty(0, bool)
            self._needy, self._others = len(needy), _Dearest(np.flatnonzero(outside), self._cost)
        return self._others.close(rest, self.open) or closed


class _Dearest:
    """Some instances, the dearest first, of which those that cost more than there is room for are closed.

    Args:
        rows: int64 [rows].
        cost: [instances].
    """

    def __init__(self, rows: np.ndarray, cost: np.ndarray) -> None:
        self._rows = rows[np.argsort(-cost[rows], kind="stable")]
        self._falling = -np.asarray(cost[self._rows], np.float64)
        self._closed = 0

    def close(self, room: float, is_open: np.ndarray) -> bool:
        """Mark in `is_open`, bool [instances], those that cost more than `room`; returns whether that closed any."""
        end = int(np.searchsorted(self._falling, -room))
        closed = end > self._closed
        if closed:
            is_open[self._rows[self._closed : end]] = False
            self._closed = end
        return closed
