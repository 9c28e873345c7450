"""The sample step on files: rows, ids and summary, for budgets of both kinds and a target."""

import json

import pytest
from work_folder import make_work_folder

from megatron_ksa.data_tools.tags.chat_template import EncodingSettings
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.sample import METHODS, SampleSettings
from megatron_ksa.data_tools.tags.selection import read_selection, sample_step
from megatron_ksa.errors import UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work_folder(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("method", METHODS)
def test_selection_names_the_chosen_records(work, method):
    found = sample_step(work, SampleSettings("30", method=method), show_progress=False)
    rows = list(read_jsonl(work / "selection.jsonl"))
    assert [row["row"] for row in rows] == found.chosen.tolist() == read_selection(work).tolist()
    assert [row["id"] for row in rows] == [f"r{2 * row}" for row in found.chosen]
    assert all((row["gain"] is None) == (method not in ("tags", "label-graph")) for row in rows)
    assert json.loads((work / "selection.json").read_text())["information"] == pytest.approx(
        found.summary["information"]
    )


def test_tokens_are_those_of_the_template(work):
    tokens = EncodingSettings(str(work / "tokenizer"), "chatml")
    found = sample_step(work, SampleSettings("1500t"), tokens=tokens, show_progress=False)
    assert 1300 < found.summary["tokens"] <= 1500
    assert found.summary["refused_by_template"] == 0


def test_rows_stay_rows_where_a_template_refuses_instances(work):
    """Rows of the selection once named positions among the instances that were left."""
    tokenizer = json.loads((work / "tokenizer" / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    (work / "strict").mkdir()
    for path in (work / "tokenizer").iterdir():
        (work / "strict" / path.name).write_bytes(path.read_bytes())
    (work / "strict" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tokens = EncodingSettings(str(work / "strict"), "tokenizer")
    found = sample_step(work, SampleSettings("900t"), tokens=tokens, show_progress=False)
    assert found.summary["refused_by_template"] == 160
    unwritable = list(read_jsonl(work / "unwritable.jsonl"))
    assert len(unwritable) == 160 and unwritable[0] == {"id": "r2", "reason": "one turn only"}
    assert all(row % 5 == 0 for row in found.chosen) and found.chosen.max() > 40
    assert [row["id"] for row in read_jsonl(work / "selection.jsonl")] == [f"r{2 * row}" for row in found.chosen]


def test_what_a_template_has_no_form_for_is_not_chosen(tmp_path):
    """Tool calls took a part of the budget, and the write step, with ChatML, then left them out."""
    work = make_work_folder(tmp_path / "work", instances=40)
    records = list(read_jsonl(work / "records.jsonl"))
    for line in (2, 4):
        records[line]["tools"] = [{"type": "function", "function": {"name": "look"}}]
    records[6]["messages"][1]["reasoning_content"] = "thoughts"
    write_jsonl(work / "records.jsonl", records)
    found = sample_step(work, SampleSettings("37"), without_tools=True, show_progress=False)
    assert found.summary["refused_by_template"] == 3 and not {1, 2, 3} & set(found.chosen.tolist())
    # They were counted, and no file told which they were.
    assert [(row["id"], row["reason"][:20]) for row in read_jsonl(work / "unwritable.jsonl")] == [
        (name, "the template has no ") for name in ("r2", "r4", "r6")
    ]  # fmt: skip
    assert sample_step(work, SampleSettings("40"), show_progress=False).summary["refused_by_template"] == 0
    for record in records:
        record["tools"] = [{"type": "function", "function": {"name": "look"}}]
    write_jsonl(work / "records.jsonl", records)
    with pytest.raises(UsageError, match="no instance can be written: 40 the template has no form for tools"):
        sample_step(work, SampleSettings("40"), without_tools=True, show_progress=False)


def test_target_moves_the_selection(work, tmp_path):
    target = make_work_folder(tmp_path / "target", instances=20)
    arrays = read_arrays(target / "grounding.npz")
    arrays["leaves"][:] = 7
    write_arrays(target / "grounding.npz", **arrays)
    (target / "tree.npz").unlink()
    aligned = sample_step(work, SampleSettings("20", align_weight=5.0), target=target, show_progress=False).summary
    assert aligned["divergence"] < aligned["without_alignment"]["divergence"] / 2
    arrays["leaves"][:] = 1000
    write_arrays(target / "grounding.npz", **arrays)
    with pytest.raises(UsageError, match="belongs to another tree"):
        sample_step(work, SampleSettings("20"), target=target)


def test_missing_files(tmp_path):
    with pytest.raises(UsageError, match="grounding.npz does not exist"):
        sample_step(tmp_path, SampleSettings("5"))
    assert not list(tmp_path.iterdir())
