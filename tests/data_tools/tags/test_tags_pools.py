"""The made-up pools with several true tags an instance that the objective is judged on."""

import json
from collections import Counter, defaultdict

import pytest

from megatron_ksa.data_tools.benchmarks.tags_objective import ALL, TRUE_ONLY, grouped, taggers_of
from megatron_ksa.data_tools.benchmarks.tags_pools import POOLS, by_words, make_pool
from megatron_ksa.data_tools.benchmarks.tags_several import SEVERAL


@pytest.mark.parametrize(("pool", "labels", "fewest", "most"), [
    ("several-words", 20, 3, 5), ("several-even", 20, 2, 5), ("several-beside", 20, 2, 2), ("several-topics", 20, 2, 5),
])  # fmt: skip
def test_each_instance_has_its_label_among_several_tags(tmp_path, pool, labels, fewest, most):
    path = make_pool(pool, tmp_path / "one") / "pool.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counts = Counter(row["label"] for row in rows)
    assert len(counts) == labels and abs(sum(counts.values()) - 2000) < 5
    assert (max(counts.values()) / min(counts.values()) > 10) == (pool != "several-even")
    assert all(row["label"] in row["tags"] and len(set(row["tags"])) == len(row["tags"]) for row in rows)
    assert {len(row["tags"]) for row in rows} == set(range(fewest, most + 1))
    assert all(1 <= row["quality"] <= 10 for row in rows)
    # But for topics and words beside, a tag belongs to one label.
    labels_of = defaultdict(set)
    for row in rows:
        for tag in row["tags"]:
            labels_of[tag].add(row["label"])
    assert all(len(found) == 1 for found in labels_of.values()) == (pool in ("several-words", "several-even"))
    assert (make_pool(pool, tmp_path / "other") / "pool.jsonl").read_bytes() == path.read_bytes()


def test_tasks_are_tagged_with_the_words_of_their_kind(tmp_path):
    row = {"id": 7, "source": "reasoning-c", "messages": [], "label": "number_format", "tags": ["a"], "quality": 3.0}
    (tmp_path / "pool.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": "maze"}) + "\n")
    first, second = by_words(tmp_path)
    assert first == {"messages": [], "label": "number_format", "quality": 3.0,
                     "tags": ["number format", "number", "format"]}  # fmt: skip
    assert second["tags"] == ["maze"]


def test_tables_have_every_pool_once_with_each_of_its_taggers():
    assert sorted(ALL) == sorted(POOLS) and set(SEVERAL) < set(TRUE_ONLY)
    columns = [(tagger, pool) for tagger, _, pools in grouped(ALL) for pool in pools]
    assert sorted(columns) == sorted((tagger, pool) for pool in ALL for tagger in taggers_of(pool))
    assert grouped(["several-words"]) == [("data", "several true", ["several-words"])]
