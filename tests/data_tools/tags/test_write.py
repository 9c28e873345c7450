"""The write step: every chosen instance is written or listed, Megatron reads the blend, reruns give the same bytes."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split
from work_folder import TOPICS, make_work_folder, record

from megatron_ksa.data_tools.indexed import check_indexed_dataset
from megatron_ksa.data_tools.tags import blend_check
from megatron_ksa.data_tools.tags import write as write_module
from megatron_ksa.data_tools.tags.chat_template import DocumentEncoder, EncodingSettings
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.groups import GroupSettings, make_groups, slug
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import read_selection, sample_step
from megatron_ksa.data_tools.tags.write import write_step
from megatron_ksa.data_tools.tokenizers import load_tokenizer
from megatron_ksa.errors import UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_work_folder(tmp_path_factory.mktemp("work"))
    sample_step(folder, SampleSettings("60"), show_progress=False)
    return folder


def write(work, **changes):
    encoding = {"tokenizer_model": str(work / "tokenizer"), "template": "chatml"}
    names = ("tokenizer_model", "template", "loss_on", "max_length", "pack")
    encoding |= {name: changes.pop(name) for name in names if name in changes}
    return write_step(work, GroupSettings(**changes), EncodingSettings(**encoding), show_progress=False)


def blend_of(work) -> tuple[list[str], list[float]]:
    """The blend file as Megatron parses it."""
    args = SimpleNamespace(
        data_path=None, data_args_path=str(work / "blend" / "blend.txt"), train_data_path=None, valid_data_path=None,
        test_data_path=None, per_split_data_args_path=None,
    )  # fmt: skip
    return get_blend_and_blend_per_split(args)[0]


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_documents_are_the_chosen_instances_by_branch(work):
    summary = write(work, loss_on="responses")
    prefixes, weights = blend_of(work)
    encoder = DocumentEncoder(load_tokenizer(str(work / "tokenizer")), "chatml")
    expected = {
        tuple(encoder.encode(record(2 * row))[0]): encoder.encode(record(2 * row))[1] for row in read_selection(work)
    }
    assert [dataset["name"] for dataset in summary["datasets"]] == sorted(
        TOPICS, key=lambda name: -next(d["instances"] for d in summary["datasets"] if d["name"] == name)
    )
    seen = 0
    for prefix, weight, dataset in zip(prefixes, weights, summary["datasets"], strict=True):
        check_indexed_dataset(prefix)
        tokens, masks = IndexedDataset(prefix), IndexedDataset(f"{prefix}_loss_mask")
        assert len(tokens) == dataset["instances"] and weight == dataset["tokens"] == sum(map(len, tokens))
        assert dataset["tokens_in_loss"] == sum(mask.sum() for mask in masks)
        for document, mask in zip(tokens, masks, strict=True):
            np.testing.assert_array_equal(mask, expected[tuple(document)])
        seen += len(tokens)
    assert seen == summary["instances"] == 60
    assert "--response-loss-only" in summary["training_flags"]
    assert prefixes[0].endswith("_document") and all(prefix.isascii() for prefix in prefixes)
    assert not (work / "blend.partial").exists()


def test_same_bytes_again_and_for_tasks_run_elsewhere(work):
    write(work, loss_on="responses")
    first = digests(work / "blend")

    def backwards(function, tasks):
        tasks = list(tasks)
        return reversed([function(task) for task in reversed(tasks)])

    settings = GroupSettings(), EncodingSettings(str(work / "tokenizer"), "chatml", "responses")
    write_step(work, *settings, run=backwards, show_progress=False)
    assert digests(work / "blend") == first


@pytest.mark.parametrize(
    ("changes", "names", "weights"),
    [
        ({"group_by": "source"}, {"source 0", "source 1", "source 2"}, None),
        ({"weights": "equal"}, set(TOPICS), [1, 1, 1, 1]),
        ({"min_instances": 1000}, {"rest"}, None),
    ],
)
def test_groups_and_weights(work, changes, names, weights):
    summary = write(work, **changes)
    assert {dataset["name"] for dataset in summary["datasets"]} == names
    assert [dataset["weight"] for dataset in summary["datasets"]] == (
        weights or [d["tokens"] for d in summary["datasets"]]
    )
    assert not list((work / "blend").glob("*loss_mask*"))


def test_weights_of_the_target(work, tmp_path):
    target = make_work_folder(tmp_path / "target", instances=400, seed=3)
    settings = GroupSettings(weights="target"), EncodingSettings(str(work / "tokenizer"))
    weights = {
        d["name"]: d["weight"] for d in write_step(work, *settings, target=target, show_progress=False)["datasets"]
    }
    assert sum(weights.values()) == pytest.approx(400)
    assert max(weights, key=weights.get) == TOPICS[0]


def test_a_branch_that_the_target_has_nothing_of_weighs_nothing(work, tmp_path):
    """It was once an abort, after which the blend of an older selection stood beside a newer one."""
    target = make_work_folder(tmp_path / "target", instances=400, seed=3)
    arrays = read_arrays(target / "grounding.npz")
    arrays["leaves"][:] = arrays["leaves"][0]
    write_arrays(target / "grounding.npz", **arrays)
    settings = GroupSettings(weights="target"), EncodingSettings(str(work / "tokenizer"))
    summary = write_step(work, *settings, target=target, show_progress=False)
    weights = {d["name"]: d["weight"] for d in summary["datasets"]}
    assert len(weights) == 4 and sorted(weights.values())[:3] == [0, 0, 0] and max(weights.values()) > 0
    assert len(blend_of(work)[0]) == 1 and sum(d["instances"] for d in summary["datasets"]) == 60


def test_repeated_datasets_weigh_more(work):
    once, repeated = write(work), write(work, repeat="history=2.5,Algebra=0")
    tokens = {d["name"]: d["weight"] for d in once["datasets"]}
    assert {d["name"]: d["weight"] for d in repeated["datasets"]} == tokens | {
        "history": 2.5 * tokens["history"], "Algebra": 0,
    }  # fmt: skip
    assert len(blend_of(work)[0]) == 3
    refused = {"geometry=2": "no such dataset; there are", "history": "NAME=NUMBER", "a=-1": "NAME=NUMBER"}
    for repeat, message in refused.items():
        with pytest.raises(UsageError, match=message):
            write(work, repeat=repeat)
    with pytest.raises(UsageError, match="every dataset has 0"):
        write(work, min_instances=1000, repeat="rest=0")


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_packed_documents_have_the_length_of_a_sample(work, loss_on):
    """Every instance is whole in one document, and what fills the document is outside the loss."""
    plain = write(work, loss_on=loss_on)
    contents = {}
    for dataset in plain["datasets"]:
        prefix = str(work / "blend" / dataset["prefix"])
        contents[dataset["name"]] = [tuple(document.tolist()) for document in IndexedDataset(prefix)]
    length = 2 * max(len(document) for documents in contents.values() for document in documents) + 7
    packed = write(work, loss_on=loss_on, pack=length)
    end = load_tokenizer(str(work / "tokenizer")).end_of_document
    assert "--response-loss-only" in packed["training_flags"] and packed["instances"] == plain["instances"] == 60
    assert packed["tokens"] == plain["tokens"] and packed["tokens_in_loss"] == plain["tokens_in_loss"]
    for dataset in packed["datasets"]:
        prefix = str(work / "blend" / dataset["prefix"])
        documents, masks = IndexedDataset(prefix), IndexedDataset(f"{prefix}_loss_mask")
        assert len(documents) == dataset["documents"] < dataset["instances"]
        found = []
        for document, mask in zip(documents, masks, strict=True):
            assert len(document) == len(mask) == length
            bounds = np.flatnonzero(document == end) + 1
            parts = [tuple(part.tolist()) for part in np.split(document, bounds)]
            found += [part for part in parts if len(part) > 1]
            fill = length - sum(map(len, [part for part in parts if len(part) > 1]))
            assert not mask[length - fill :].any()
        assert sorted(found) == sorted(contents[dataset["name"]])
    assert digests(work / "blend") == (write(work, loss_on=loss_on, pack=length), digests(work / "blend"))[1]


def test_what_is_cut_and_what_has_no_response_is_listed(tmp_path):
    work = make_work_folder(tmp_path / "work", instances=30)
    records = [record(line) for line in range(60)]
    more = {"role": "user", "content": "And more?"}
    records[2] = records[2] | {"messages": [*records[2]["messages"], more]}
    records[4] = records[4] | {"messages": records[4]["messages"][:1]}
    write_jsonl(work / "records.jsonl", records)
    sample_step(work, SampleSettings("30"), show_progress=False)
    summary = write(work, loss_on="responses")
    assert summary["unwritten"] == 1 and summary["shortened"] == 1 and summary["instances"] == 29
    assert summary["reasons"] == {"no response": 1}
    assert list(read_jsonl(work / "blend" / "unwritten.jsonl")) == [{"id": "r4", "reason": "no response"}]
    assert list(read_jsonl(work / "blend" / "shortened.jsonl")) == [
        {"id": "r2", "after_last_response": 1, "beyond_length": 0}
    ]
    found = sample_step(work, SampleSettings("29"), responses=True, show_progress=False)
    assert found.summary["without_response"] == 1 and 2 not in found.chosen


def test_a_length_that_no_instance_has_is_not_the_templates_fault(work):
    """The error said that `--template chatml refuses every instance`, whatever the cause."""
    with pytest.raises(UsageError, match="no instance can be written: .*longer than 3 tokens.*--max-length"):
        write(work, max_length=3)


@pytest.mark.parametrize(
    ("repeat", "message"),
    [
        ("Algebra=1e308", "from 1e-06 to 1,000,000"), ("Algebra=1e-300", "from 1e-06"), ("Algebra=nan", "give NAME"),
        ("=2", "give NAME"), ("Algebra", "give NAME"), ("Algebra=1,Algebra=2", "each name once"),
    ],
)  # fmt: skip
def test_repetitions_that_no_blend_can_count_with(repeat, message):
    """1e308 ended in a traceback of Megatron's, and in one of JSON's in the export step."""
    with pytest.raises(UsageError, match=message):
        GroupSettings(repeat=repeat)


def test_a_dataset_to_repeat_is_looked_for_before_anything_is_written(work, monkeypatch):
    """Its name was looked up after every instance had been encoded; --align-weight was to help where all count 0."""
    monkeypatch.setattr(write_module, "encode_records", lambda *arguments: pytest.fail("encoded"))
    with pytest.raises(UsageError, match="--repeat nowhere: no such dataset; there are "):
        write(work, repeat="nowhere=2")
    with pytest.raises(UsageError, match="--repeat: every dataset has 0"):
        write(work, repeat="rest=0", min_instances=1000)


def test_groups_beyond_the_limit_are_one():
    keys = [key for key in range(150) for _ in range(150 - key)]
    groups = make_groups(keys, {key: f"Group {key}" for key in keys}, 1)
    assert len({group.prefix for group in groups}) == 100
    assert groups[0].prefix == "00-group-0_document" and groups[-1].prefix == "99-rest_document"
    assert len({id(group) for group in groups}) == 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Größe & <b>Maß</b>", "groe-b-ma-b"),
        ("../../etc/passwd", "etc-passwd"),
        ("中文", "unnamed"),
        ("a" * 90, "a" * 40),
    ],
)
def test_names_are_safe_in_paths(name, expected):
    assert slug(name) == expected


def test_instances_that_a_template_refuses_are_listed(work):
    config = json.loads((work / "tokenizer" / "tokenizer_config.json").read_text())
    (work / "strict").mkdir()
    for path in (work / "tokenizer").iterdir():
        (work / "strict" / path.name).write_bytes(path.read_bytes())
    for template, refused in (("{{ raise_exception('no chat') }}", "no chat"), ("no content", "once and in order")):
        (work / "strict" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        write_module_encoder_reset()
        summary = write(work, tokenizer_model=str(work / "strict"), template="tokenizer")
        unwritten = list(read_jsonl(work / "blend" / "unwritten.jsonl"))
        assert (
            summary["unwritten"] == sum(summary["reasons"].values()) == len(unwritten) == 60 - summary["instances"] > 0
        )
        assert all(refused in row["reason"] for row in unwritten)


def test_template_that_refuses_every_instance_says_why(work, tmp_path):
    for path in (work / "tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('no') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [row for row in read_selection(work).tolist() if row % 5]
    chosen = [json.loads(line) for line in (work / "selection.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(work / "selection.jsonl", (row for row in chosen if row["row"] in rows))
    with pytest.raises(UsageError, match=f"no instance can be written: {len(rows)} no "):
        write(work, tokenizer_model=str(tmp_path), template="tokenizer")
    write_jsonl(work / "selection.jsonl", chosen)
    assert not (work / "blend.partial").exists()


def write_module_encoder_reset() -> None:
    """The tokenizer of a path is loaded once in a process; these tests change what lies there."""
    from megatron_ksa.data_tools.tags import chat_template

    chat_template._encoder.cache_clear()


def test_killed_run_leaves_the_old_blend_and_a_rerun_gives_the_same_bytes(work):
    write(work)
    old = digests(work / "blend")
    settings = GroupSettings(), EncodingSettings(str(work / "tokenizer"), "plain", "responses")

    def killed(function, tasks):
        yield function(next(iter(tasks)))
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=write_step, args=(work, *settings), kwargs={"run": killed, "show_progress": False}
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (work / "blend.partial").exists() and digests(work / "blend") == old
    write_step(work, *settings, show_progress=False)
    after_kill = digests(work / "blend")
    shutil.rmtree(work / "blend")
    write_step(work, *settings, show_progress=False)
    assert digests(work / "blend") == after_kill != old
    assert not (work / "blend.partial").exists()


def test_interrupt_before_the_rename_leaves_the_old_blend(work, monkeypatch):
    write(work)
    before = digests(work / "blend")
    monkeypatch.setattr(write_module, "check_blend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(work, template="plain")
    assert digests(work / "blend") == before
    assert not (work / "blend.partial").exists()


def test_megatrons_reading_is_checked(work):
    datasets = [dict(d) for d in write(work)["datasets"]]
    blend_check.check_blend(work / "blend", datasets, 256, 257)
    with pytest.raises(UsageError, match="Megatron reads other tokens"):
        blend_check.check_blend(work / "blend", datasets, 256, 100)
    datasets[0]["written_tokens"] += 1
    with pytest.raises(UsageError, match="read back"):
        blend_check.check_blend(work / "blend", datasets, 256, 257)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_on": "prompts"}, "--loss-on prompts"), ({"group_by": "size"}, "--group-by size"),
        ({"weights": "x"}, "--weights x"),
        ({"weights": "target", "group_by": "source"}, "--group-by branch"), ({"weights": "target"}, "needs --target"),
        ({"min_instances": 0}, "--min-instances 0"), ({"template": "best"}, "--template best"),
        ({"tokenizer_model": None}, "--tokenizer-model is needed"),
        ({"tokenizer_model": "nowhere"}, "no such file"), ({"template": "tokenizer"}, "no chat template"),
    ],
)  # fmt: skip
def test_bad_settings(work, changes, message):
    with pytest.raises(UsageError, match=message):
        write(work, **changes)


def test_nothing_chosen_and_white_space(work, tmp_path):
    folder = make_work_folder(tmp_path / "a folder", instances=20)
    sample_step(folder, SampleSettings("5"), show_progress=False)
    with pytest.raises(UsageError, match="white space"):
        write(folder)
    folder = (tmp_path / "a folder").rename(tmp_path / "folder")
    write_jsonl(folder / "selection.jsonl", [])
    with pytest.raises(UsageError, match="nothing is chosen"):
        write(folder)


def test_every_budget_has_a_blend_in_one_run(work, tmp_path):
    """Nested budgets took one write each, and each write replaced the blend of the one before."""
    shutil.copytree(work, tmp_path / "work")
    work = tmp_path / "work"
    sample_step(work, SampleSettings("10,30,60"), show_progress=False)
    summary = write(work, every_budget=True)
    assert (summary["instances"], summary["smaller_blends"]) == (60, 2)
    for budget, count in ((1, 10), (2, 30)):
        folder = work / "blend" / f"budget-{budget}"
        assert json.loads((folder / "blend.json").read_text())["instances"] == count
        many = digests(folder)
        text = (folder / "blend.txt").read_text()
        assert all(check_indexed_dataset(prefix) is None for prefix in text.split()[1::2])
        assert write(work, of_budget=budget)["smaller_blends"] == 0 and not folder.exists()
        alone = {name: digest for name, digest in digests(work / "blend").items() if name not in PLACED}
        assert alone == {name: digest for name, digest in many.items() if name not in PLACED}
        write(work, every_budget=True)


# Files that name their own place or settings.
PLACED = ("blend.txt", "blend.json")
