"""`--budget`: instances, a fraction of the pool, or tokens."""

import re
from dataclasses import dataclass

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
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise UsageError(f"--budget {text[:60]}: not one of {FORMS}")
    if float(form["number"]) > _LARGEST:
        raise UsageError(f"--budget {text[:60]}: at most {_LARGEST:g}")
    number, unit = float(form["number"]), form["unit"]
    if unit in _TOKENS:
        if tokens is None:
            raise UsageError(f"--budget {text}: tokens can be counted only with --tokenizer-model")
        budget, available, name = Budget(round(number * _TOKENS[unit]), True), int(tokens.sum()), "tokens"
        if instances and budget.amount < tokens.min():
            raise UsageError(f"--budget {text}: the shortest instance has {tokens.min():,} tokens")
    else:
        if unit == "%" or "." in form["number"]:
            share = number / 100 if unit == "%" else number
            if share > 1:
                raise UsageError(f"--budget {text}: a fraction is at most 1 (100%); instances are an integer")
            # A fraction of a pool that is not empty is at least one instance.
            number = max(1, round(share * instances)) if share else 0
        budget, available, name = Budget(int(number), False), instances, "instances"
    if budget.amount < 1:
        raise UsageError(f"--budget {text}: choose at least one instance")
    if budget.amount > available:
        raise UsageError(f"--budget {text}: the pool has {available:,} {name}; ask for at most that")
    return budget
