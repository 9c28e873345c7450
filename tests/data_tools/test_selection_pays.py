"""The experiments that ask whether a selection pays: what they count, hold out and call a difference."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from megatron_ksa.data_tools.benchmarks import tags_pays
from megatron_ksa.data_tools.benchmarks.compared import by_choice, difference, differs
from megatron_ksa.data_tools.benchmarks.tags_tasks import FEWEST, SETS, split
from megatron_ksa.data_tools.benchmarks.task_model import VOCABULARY, Model, encode, evaluate, learn_tokens, train


def task(label: str, question: str) -> dict:
    """A task with its label as answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": label}]
    return {"messages": messages, "label": label, "tags": [label], "kind_of": "reasoning"}


def test_a_copy_whose_original_is_left_out_is_no_copy():
    """Since the best-scored copy stays, TAGS was said to choose 34 % copies, though no text was chosen twice."""
    originals, topics = np.array([7, 7, 7, 3, 5, 6]), np.array([0, 0, 0, 1, 1, tags_pays.JUNK_TOPIC])
    found = tags_pays.planted(originals, topics)
    assert found["copy"] == pytest.approx(2 / 6) and found["junk"] == pytest.approx(1 / 6)
    assert tags_pays.planted(originals[2:], topics[2:])["copy"] == 0
    share = np.array([3 / 5, 2 / 5])
    assert found["topics"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_no_question_that_is_held_out_is_in_the_pool():
    """Held-out tasks were generated with another seed: kinds with few questions gave them again."""
    held = sum(SETS.values())
    rows = [task("many", f"question {n}") for n in range(held + FEWEST)] * 2
    rows += [task("few", f"other {n}") for n in range(held + FEWEST - 1)]
    pool, held_out = split(rows, np.random.default_rng(0))
    questions = [[row["messages"][0]["content"] for row in part] for part in (pool, held_out)]
    assert len(pool) == FEWEST and not set(questions[0]) & set(questions[1])
    assert {name: sum(row["set"] == name for row in held_out) for name in SETS} == SETS
    assert len(set(questions[1])) == held and {row["label"] for row in [*pool, *held_out]} == {"many"}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_counts_where_the_paired_t_test_says_so(seeds):
    generator, verdicts = np.random.default_rng(seeds), set()
    for shift in np.linspace(0, 20, 60):
        first, second = generator.normal(size=(2, seeds)) + [[shift], [0]]
        verdict = differs((first - second).tolist())
        assert verdict == bool(ttest_rel(first, second).pvalue < 0.05)
        assert difference(first.tolist(), second.tolist()).startswith("**+") == verdict or not verdict
        verdicts.add(verdict)
    assert verdicts == {True, False}


def test_one_seed_tells_no_difference():
    assert not differs([100.0]) and difference([2.0], [1.0]) == "+1.000"
    assert difference([2.0, 2.2, 2.1], [1.0, 1.2, 1.1]) == "**+1.000 ± 0.000**"
    assert difference([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]) == "+0.000 ± 0.000"


def test_choices_that_lack_a_seed_are_left_out_and_seeds_keep_their_order():
    runs = [{"choice": "a", "seed": seed} for seed in (1, 0)] + [{"choice": "b", "seed": 0}]
    assert by_choice(runs, ["b", "a", "c"], [0, 1]) == {"a": [runs[1], runs[0]]}


def test_each_task_counts_alike_whatever_its_length_and_its_neighbours():
    """The loss was that of all tokens, so that kinds with long answers decided it on the balanced set."""
    rows = [task("a", "one " * 9), task("bb bb bb", "two"), task("c " * 40, "three " * 50)]
    tokenizer = learn_tokens(message["content"] for row in rows for message in row["messages"])
    tasks, model = encode(rows, tokenizer), train(encode(rows, tokenizer), seed=0, steps=30)
    losses, right = evaluate(model, tasks)
    for number in range(len(rows)):
        one = tasks.take(np.array([number]))
        ids, where = one.ids, torch.zeros_like(one.answer)
        where[:, :-1] = one.answer[:, 1:]
        with torch.no_grad():
            logits = model(ids, where)
        loss = torch.nn.functional.cross_entropy(logits, ids[one.answer])
        assert losses[number] == pytest.approx(float(loss), rel=1e-4)
        assert right[number] == bool((logits.argmax(-1) == ids[one.answer]).all())
    assert right.any() and losses.mean() < np.log(VOCABULARY) / 2
    assert not evaluate(Model(), tasks)[1].any()
