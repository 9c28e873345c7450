"""`--budget`: instances, a fraction of the pool, or tokens."""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_ksa.errors import UsageError

_FORM = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)(?P<unit>%|[kMG]?t)?")
# More than any pool has; what is beyond it is not a number that floats count in ones.
_LARGEST = 1e15
_TOKENS = {"t": 1, "kt": 10**3, "Mt": 10**6, "Gt": 10**9}
FORMS = "an integer (instances), 0.05 or 5% (a fraction of the pool), 500kt, 20Mt, 1.5Gt or 20000t (tokens)"


@dataclass(frozen=True)
class Budget:
    """How much to choose: `amount` instances, or tokens where `in_tokens`."""

    amount: int
    in_tokens: bool


@dataclass(frozen=True)
class Asked:
    """A budget as it is written: a share of the pool, or an `amount` above 0 of instances or tokens."""

    amount: float
    unit: str


def parse_form(text: str) -> Asked:
    """What a budget asks for, whatever the pool: `unit` is `share`, `instances` or `tokens`.

    Raises:
        UsageError: another form, a share above 1, or nothing to choose.
    """
    text = text.strip()
    form = _FORM.fullmatch(text)
    if form is None:
        raise UsageError(f"--budget {text[:60]}: not one of {FORMS}")
    number, unit = float(form["number"]), form["unit"]
    if number > _LARGEST:
        raise UsageError(f"--budget {text[:60]}: at most {_LARGEST:g}")
    if unit in _TOKENS:
        asked = Asked(round(number * _TOKENS[unit]), "tokens")
    elif unit == "%" or "." in form["number"]:
        asked = Asked(number / 100 if unit == "%" else number, "share")
        if asked.amount > 1:
            raise UsageError(f"--budget {text}: a fraction is at most 1 (100%); instances are an integer")
    else:
        asked = Asked(int(number), "instances")
    if asked.amount <= 0:
        raise UsageError(f"--budget {text}: choose at least one instance")
    return asked


def parse_forms(text: str) -> list[Asked]:
    """Several budgets, joined by commas.

    Raises:
        UsageError: one that `parse_form` refuses, or budgets of which one does not hold the one before.
    """
    found = [parse_form(part) for part in text.split(",")]
    for before, after in pairwise(found):
        falls = after.unit == before.unit and after.amount <= before.amount
        if falls or (after.unit == "tokens") != (before.unit == "tokens"):
            raise UsageError(f"--budget {text}: several budgets rise, all in tokens or all in instances")
    return found


def counts_tokens(text: str) -> bool:
    """Whether a budget of this form is in tokens."""
    form = _FORM.fullmatch(text.strip())
    return form is not None and form["unit"] in _TOKENS


def parse_budget(text: str, instances: int, tokens: np.ndarray | None) -> Budget:
    """The budget that `text` means for a pool.

    Args:
        tokens: int [instances], or None where they are not known.

    Raises:
        UsageError: another form, nothing to choose, or more than the pool has.
    """
    asked = parse_form(text)
    if asked.unit == "tokens":
        if tokens is None:
            raise UsageError(f"--budget {text}: tokens can be counted only with --tokenizer-model")
        budget, available = Budget(int(asked.amount), True), int(tokens.sum())
        if instances and budget.amount < tokens.min():
            raise UsageError(f"--budget {text}: the shortest instance has {tokens.min():,} tokens")
    else:
        # A fraction of a pool that is not empty is at least one instance.
        amount = max(1, round(asked.amount * instances)) if asked.unit == "share" else asked.amount
        budget, available = Budget(int(amount), False), instances
    if budget.amount > available:
        name = "tokens" if budget.in_tokens else "instances"
        raise UsageError(f"--budget {text}: the pool has {available:,} {name}; ask for at most that")
    return budget
