"""Every grammar of the project, fuzzed: any text is read as what it says, or refused in one line."""

import ast
import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.config.patterns import parse_integers, parse_letters
from megatron_ksa.data_tools.tags.budget import counts_tokens, parse_budget
from megatron_ksa.errors import UsageError

LAYERS = 4
EXAMPLES = settings(max_examples=400, deadline=None)
# Pieces of the grammars, and what people and machines write beside them.
PIECES = st.sampled_from(
    [*"0123456789", *"[](),+*.-%", " ", "\t", "k", "f", "l", "kkkf", "128", "1024", "999999999",
     "1000000000", "9" * 400, "e5", "1e999", "nan", "inf", "t", "kt", "Mt", "Gt", "٣", "²", "\n", "0x10",
     "1_000", "__import__('os')", "\0"]
)  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=9).map("".join), st.text(max_size=12))


def one_line(function, *arguments):
    """What a function returns, or None where it refuses its arguments in one line of bearable length."""
    try:
        return function(*arguments)
    except UsageError as error:
        assert str(error).strip() and len(str(error)) < 1000
        return None


def flattened(text: str) -> list[int]:
    """A pattern of integers read by Python itself, whose lists and operators it borrows."""

    def items(value: object) -> list:
        return value if isinstance(value, list) else [value]

    class Entries(list):
        __add__ = lambda self, other: Entries([*self, *other])  # noqa: E731
        __mul__ = lambda self, count: Entries(list(self) * count.entries[0])  # noqa: E731

    class Number:
        def __init__(self, value: int) -> None:
            self.entries = [value]

        __add__ = lambda self, other: as_entries(self) + as_entries(other)  # noqa: E731
        __mul__ = lambda self, count: as_entries(self) * count  # noqa: E731

    def as_entries(value: object) -> Entries:
        return value if isinstance(value, Entries) else Entries(value.entries)

    def walk(node: ast.expr) -> object:
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            return as_entries(left) + as_entries(right) if isinstance(node.op, ast.Add) else as_entries(left) * right
        if isinstance(node, ast.List):
            return Entries(itertools.chain.from_iterable(walk(each).entries for each in node.elts))
        return Number(node.value)

    without_zeros = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text.strip())  # Python has none before a number
    return list(as_entries(walk(ast.parse(without_zeros, mode="eval").body)))


@EXAMPLES
@given(TEXTS)
@example("2 2 2 2")
@example("128 128 128 1024")
@example("1 28*4")
@example("[1, 2]*2")
@example("(" * 100_000 + "1")
@example("1+" * 60_000 + "1")
@example("(1*65536)+(1*65536)")
@example("([128]*3+[1024])")
def test_integer_patterns(text):
    """`2 2 2 2` was one window of 2222, and the digits beyond the ninth of a number were dropped."""
    found = one_line(parse_integers, text, LAYERS, "--flag")
    if found is not None:
        expected = flattened(text)
        assert list(found) == (expected * LAYERS if len(expected) == 1 else expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 2 2 2", r"write for example 2\+2\+2\+2"),
        ("128 128 128 1024", r"write for example 128\+128\+128\+1024"),
        ("1 28", r"unexpected '28'.*write for example 1\+28"),
        ("1000000000", "more than 9 digits"),
        ("[1]*1234567890123", "more than 9 digits"),
        ("1" * 500, "^.{0,200}more than 9 digits"),
        ("(" * 60 + "1" + ")" * 60, "more than 50 parentheses"),
        ("+".join(["1*65536"] * 2), "more than 65536 entries"),
        ("٣", "not in the grammar"),
    ],
)
def test_integer_patterns_that_were_read_as_others(text, message):
    with pytest.raises(UsageError, match=message):
        parse_integers(text, LAYERS, "--ksa-window-chunks")


@EXAMPLES
@given(TEXTS)
@example("k k k f")
@example("k" * 100_000)
@example("kk f*2")
def test_letter_patterns(text):
    found = one_line(parse_letters, text, "klf", LAYERS, "--flag")
    if found is not None:
        assert len(found) == LAYERS and set(found) <= set("klf")
        letters = [character for character in text if character.isalpha()]
        assert set(letters) == set(found)
        if text.isalpha():
            assert list(found) == (letters * LAYERS if len(letters) == 1 else letters)


def test_letters_apart_are_refused():
    with pytest.raises(UsageError, match=r"write for example k\+k\+k\+f"):
        parse_letters("k k k f", "klf", LAYERS, "--ksa-layer-pattern")


@EXAMPLES
@given(TEXTS)
@example("9" * 400 + ",1")
@example("1e999,1")
@example("nan,1")
def test_base_lists(text):
    found = one_line(HarpeConfig(bases=text or ",").resolve, 2)
    if found is not None:
        assert found == tuple(float(part) for part in text.split(",")) and all(1 <= base <= 1e18 for base in found)


@EXAMPLES
@given(TEXTS)
@example("9" * 400)
@example("9" * 400 + "t")
@example("1e999")
@example("1e999Gt")
@example("1e999%")
@example("5%")
@example("0.5")
@example("1")
@example("2kt")
def test_budgets(text):
    """A budget of 400 digits ended in an OverflowError."""
    lengths = np.full(100, 50)
    counts_tokens(text)
    found = one_line(parse_budget, text, len(lengths), lengths)
    if found is not None:
        assert 1 <= found.amount <= (5000 if found.in_tokens else 100)
        assert found.in_tokens == text.strip().endswith("t")
