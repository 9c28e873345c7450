"""Bounds by source and branch, records that are always chosen, and several budgets, each with the one before in it."""

import json

import numpy as np
import pytest
from work_folder import TOPICS, make_work_folder

from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.chat_template import EncodingSettings
from megatron_ksa.data_tools.tags.constraints import ConstraintSettings, Ledger, Limit, Rules, parse_bounds
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.groups import repetitions
from megatron_ksa.data_tools.tags.objective import tree_information
from megatron_ksa.data_tools.tags.pool import load_pool
from megatron_ksa.data_tools.tags.sample import METHODS, SampleSettings
from megatron_ksa.data_tools.tags.selection import read_selection, sample_step, selected_rows
from megatron_ksa.errors import UsageError

SOURCE = np.array([f"source {2 * row % 3}" for row in range(200)])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work_folder(tmp_path_factory.mktemp("work"))


def chosen(work, budget="40", constraints=None, **settings) -> np.ndarray:
    method = settings.pop("method", "tags")
    found = sample_step(work, SampleSettings(budget, method=method), constraints, show_progress=False, **settings)
    return found.chosen


@pytest.mark.parametrize("method", METHODS)
def test_quotas_and_floors_by_source(work, method):
    free = np.unique(SOURCE[chosen(work, method=method)], return_counts=True)[1]
    constraints = ConstraintSettings(quota="source:source 0=10%", floor="source:source 1=25")
    rows = chosen(work, constraints=constraints, method=method)
    bound = np.unique(SOURCE[rows], return_counts=True)[1]
    assert len(rows) == len(set(rows.tolist())) == 40
    assert bound[0] == 4 < free[0] and bound[1] == 25 > free[1]


def test_a_budget_that_quotas_leave_no_room_for_is_told(work):
    """Three instances of forty were chosen, and nothing said that quotas were the cause."""
    constraints = ConstraintSettings(quota=",".join(f"source:{name}=1" for name in np.unique(SOURCE)))
    found = sample_step(work, SampleSettings("40"), constraints, show_progress=False)
    assert found.summary["short_of_budget"] == 40 - len(np.unique(SOURCE)) == 40 - len(found.chosen)


def test_quotas_by_branch(work):
    pool = load_pool(work, vectors=True)
    names = np.asarray(pool.names)[branch_of(pool, np.flatnonzero(pool.depth == 1))]
    rows = chosen(work, constraints=ConstraintSettings(quota=f"branch:{TOPICS[0]}=3", floor="branch:history=50%"))
    assert (names[rows] == TOPICS[0]).sum() == 3 and (names[rows] == "history").sum() >= 20


def test_bounds_in_tokens(work):
    encoding = EncodingSettings(str(work / "tokenizer"), "chatml")
    constraints = ConstraintSettings(quota="source:source 0=300", floor="source:source 1=50%")
    found = sample_step(work, SampleSettings("2kt"), constraints, tokens=encoding, show_progress=False)
    from megatron_ksa.data_tools.tags.selection import count_tokens

    tokens, _ = count_tokens(work, load_pool(work), encoding)
    spent = {name: int(tokens[found.chosen][SOURCE[found.chosen] == name].sum()) for name in set(SOURCE)}
    assert spent["source 0"] <= 300 and spent["source 1"] >= 1000 - tokens.max() and sum(spent.values()) <= 2000


def test_what_is_always_chosen(work, tmp_path):
    (tmp_path / "ids.txt").write_text("r398\nr2\n\n", encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text('{"id": "r398", "rank": 1}\n{"id": "r2"}\n', encoding="utf-8")
    for name in ("ids.txt", "ids.jsonl"):
        for method in METHODS:
            rows = chosen(work, constraints=ConstraintSettings(always=str(tmp_path / name)), method=method)
            assert rows[:2].tolist() == [199, 1] and len(set(rows.tolist())) == 40


def test_ids_with_separators_of_lines_in_them(work, tmp_path):
    """str.splitlines cut an id at U+2028, so that a record could not be named."""
    (tmp_path / "ids.txt").write_bytes("a\u2028b \r\n\n c\x0bd\n".encode())
    assert ConstraintSettings(always=str(tmp_path / "ids.txt")).always_ids() == ["a\u2028b", "c\x0bd"]
    (tmp_path / "ids.jsonl").write_bytes(b'{"id": " a\\nb "}\r\n\n{"id": " a\\nb "}\n')
    assert ConstraintSettings(always=str(tmp_path / "ids.jsonl")).always_ids() == [" a\nb "]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "ids.jsonl:2: no JSON"), ("[1]", "no object with an id"), ('{"id": 3}', "no object")]
)
def test_a_list_of_ids_that_cannot_be_read_is_no_file_of_a_step(tmp_path, line, message):
    """The error told the user to delete the list and to run the step that writes it again."""
    (tmp_path / "ids.jsonl").write_text(f'{{"id": "a"}}\n{line}\n')
    with pytest.raises(UsageError, match=message) as caught:
        ConstraintSettings(always=str(tmp_path / "ids.jsonl")).always_ids()
    assert str(caught.value).startswith("--always") and "delete" not in str(caught.value)


def test_why_a_record_cannot_be_chosen_is_told(work, tmp_path):
    """Only its id was told, whether it was misspelt, a duplicate or evaluation data."""
    (tmp_path / "ids.txt").write_text("r1\n")
    constraints = ConstraintSettings(always=str(tmp_path / "ids.txt"))
    duplicates = work / "duplicates.jsonl"
    for row, message in (
        ({"id": "r1", "kept": "r2"}, "duplicates.jsonl has it, 'r2' stands for it"),
        (None, "no resp"),
    ):
        duplicates.write_text("" if row is None else json.dumps(row) + "\n")
        with pytest.raises(UsageError, match=message):
            chosen(work, constraints=constraints)
    duplicates.unlink()
    (tmp_path / "ids.txt").write_text("R1\n")
    with pytest.raises(UsageError, match="'R1' .no such id in records.jsonl"):
        chosen(work, constraints=constraints)


def test_names_with_commas():
    """A tag such as "C, C++" names a branch, and could not be bounded."""
    bounds = parse_bounds("--quota", "branch:C, C++=5%, source:a,b=3,source:x=1,")
    assert [(bound.kind, bound.name, bound.amount) for bound in bounds] == [
        ("branch", "C, C++", 0.05), ("source", "a,b", 3), ("source", "x", 1)
    ]  # fmt: skip
    assert repetitions("C, C++=2, a=b=0.5,x=0") == {"C, C++": 2, "a=b": 0.5, "x": 0}


def test_several_budgets_are_nested(work):
    rows = chosen(work, "10,20%, 60")
    found = list(read_jsonl(work / "selection.jsonl"))
    assert [sum(row["budget"] <= number for row in found) for number in (1, 2, 3)] == [10, 40, 60]
    assert [row["row"] for row in found] == rows.tolist()
    np.testing.assert_array_equal(read_selection(work, 1), chosen(work, "10"))
    summary = chosen(work, "10,60") is not None and json.loads((work / "selection.json").read_text())
    assert [each["instances"] for each in summary["smaller_budgets"]] == [10] and summary["instances"] == 60
    with pytest.raises(UsageError, match="--of-budget 3: the selection has 2"):
        selected_rows(work, 3)


@pytest.mark.parametrize(
    ("constraints", "budget", "message"),
    [
        ({"quota": "flan=3"}, "40", "give source:NAME=AMOUNT"), ({"quota": "source:a=x"}, "40", "give source:NAME"),
        ({"floor": "source:a=120%"}, "40", "give source:NAME"),
        ({"quota": "source:a=1,source:a=2"}, "40", "given twice"),
        ({"quota": "source:nowhere=3"}, "40", "the pool has none; it has source 0"),
        ({"floor": "source:source 0=100"}, "140", "the pool has 67, less than 100"),
        ({"floor": "source:source 0=30,source:source 1=30"}, "40", "--floor: needs 60 of a --budget of 40"),
        ({"floor": "source:source 0=5", "quota": "source:source 0=4"}, "40", "5 is more than its --quota 4"),
        ({"always": "nowhere.txt"}, "40", "--always nowhere.txt: no such file"),
        ({}, "40,10", "several budgets rise"), ({}, "10,2kt", "tokens can be counted only"),
    ],
)  # fmt: skip
def test_what_cannot_be_met(work, constraints, budget, message):
    with pytest.raises(UsageError, match=message):
        chosen(work, budget, ConstraintSettings(**constraints))


def test_unknown_and_too_many_ids(work, tmp_path):
    (tmp_path / "ids.txt").write_text("r2\nr1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="1 of its records cannot be chosen here, such as 'r1'"):
        chosen(work, constraints=ConstraintSettings(always=str(tmp_path / "ids.txt")))
    (tmp_path / "ids.txt").write_text("r2\nr4\n", encoding="utf-8")
    with pytest.raises(UsageError, match="--always: its records need 2 of a --budget of 1"):
        chosen(work, "1", ConstraintSettings(always=str(tmp_path / "ids.txt")))
    # The quota was exceeded without a word.
    (tmp_path / "ids.txt").write_text("r0\nr6\nr12\n", encoding="utf-8")
    constraints = ConstraintSettings(always=str(tmp_path / "ids.txt"), quota="source:source 0=2")
    with pytest.raises(UsageError, match="--always: its records have 3 of source source 0, more than its --quota 2"):
        chosen(work, constraints=constraints)
    with pytest.raises(UsageError, match="--parts: not with"):
        constraints = ConstraintSettings(quota="source:source 0=3")
        sample_step(work, SampleSettings("40", parts=2), constraints, show_progress=False)


@pytest.mark.parametrize("in_tokens", [False, True])
def test_lazy_and_plain_greedy_choose_the_same_under_rules(in_tokens):
    pool, _ = topic_pool(instances=400)
    groups = np.arange(400) % 5
    for seed in range(4):
        generator = np.random.default_rng(seed)
        cost = generator.integers(1, 30, 400).astype(float) if in_tokens else np.ones(400)
        budget = 600.0 if in_tokens else 60.0
        limits = tuple(
            Limit(groups == group, least=least * budget, most=most * budget)
            for group, least, most in ((0, 0.3, 1), (1, 0, 0.05), (2, 0.1, 0.12))
        )
        rules = Rules(generator.choice(400, 3, replace=False), limits)
        strength = generator.uniform(0.5, 1.5, 400)
        coverage = tree_information(pool.shares, strength, pool.parent, np.ones(len(pool.parent)))
        costs = cost if in_tokens else None
        lazy, plain = (greedy(coverage, budget, costs, lazy=lazy, rules=rules, window=16) for lazy in (True, False))
        np.testing.assert_array_equal(lazy.chosen, plain.chosen)
        spent = [cost[plain.chosen][groups[plain.chosen] == group].sum() for group in range(5)]
        assert spent[0] >= 0.3 * budget - cost.max() and spent[2] <= 0.12 * budget + cost[rules.first].sum()
        assert plain.chosen[:3].tolist() == rules.first.tolist() and cost[plain.chosen].sum() <= budget


def test_a_ledger_closes_what_bounds_forbid():
    member = np.array([True, True, True, False])
    ledger = Ledger(Rules(limits=(Limit(member, most=2.0),)), np.ones(4), 4)
    assert not ledger.take(0) and ledger.take(1) and ledger.open.tolist() == [False, False, False, True]
    kept = Ledger(Rules(limits=(Limit(member, least=2.0),)), np.ones(4), 2)
    assert kept.open.tolist() == [True, True, True, False]


def test_forms_of_bounds():
    share, number = parse_bounds("--quota", "source:a b=20%, branch:c=d=7")
    assert (share.name, share.of(50), number.name, number.of(50)) == ("a b", 10.0, "c=d", 7.0)
