"""The report: right numbers, and nothing from the pool that could act as code; test_report_page.py shows it."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from report_folder import HOSTILE, hostile_work_folder
from tag_pools import random_pool
from work_folder import TOPICS, make_work_folder

from megatron_ksa.data_tools.tags import report_audit, report_page
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json, write_jsonl
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.report import ReportSettings, _own_note, report_step
from megatron_ksa.data_tools.tags.report_compare import measure, random_measures
from megatron_ksa.data_tools.tags.report_data import (
    choose_samples,
    largest_nodes,
    node_statistics,
    preorder,
    typical_rows,
)
from megatron_ksa.data_tools.tags.report_map import Map, _spread_out
from megatron_ksa.data_tools.tags.report_page import _hash, json_block, node_columns
from megatron_ksa.data_tools.tags.report_points import point_rows
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import read_selection, sample_step
from megatron_ksa.errors import UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = hostile_work_folder(tmp_path_factory.mktemp("work"))
    report_step(folder, target=folder / "target")
    return folder


def test_statistics_are_those_of_a_count_by_hand():
    random = random_pool(4, instances=40, nodes=25)
    quality = np.where(np.arange(40) % 5 == 0, np.nan, np.arange(40.0))
    pool = Pool(random.indptr, random.leaves, quality, quality, random.parent, random.depth)
    chosen = np.array([3, 7, 20, 5])
    found = node_statistics(pool, chosen, pool.shares[30:])

    def below(node):
        return [v for v in range(25) if node in path(v)]

    def path(v):
        return [v] if pool.parent[v] < 0 else [v, *path(pool.parent[v])]

    tags = [random.leaves[random.indptr[i] : random.indptr[i + 1]] for i in range(40)]

    def mass(rows, nodes):
        return sum(np.isin(tags[i], nodes).sum() / len(tags[i]) for i in rows if len(tags[i]))

    covered = np.unique(np.concatenate([tags[i] for i in chosen]))
    for node in range(25):
        inside = below(node)
        having = [i for i in range(40) if np.isin(tags[i], inside).any()]
        assert found.pool[node] == len(having)
        assert found.selected[node] == len(set(having) & set(chosen))
        for share, rows in (
            (found.pool_share, range(40)),
            (found.selected_share, chosen),
            (found.target_share, range(30, 40)),
        ):
            assert share[node] == pytest.approx(mass(rows, inside) / mass(rows, range(25)))
        everything = mass(range(40), inside)
        expected = mass(range(40), np.intersect1d(inside, covered)) / everything if everything else np.nan
        assert found.coverage[node] == pytest.approx(expected, nan_ok=True)
        scores = [quality[i] for i in having if not np.isnan(quality[i])]
        assert found.pool_quality[node] == pytest.approx(np.mean(scores) if scores else np.nan, nan_ok=True)


def test_largest_nodes_keep_what_is_above_and_come_in_preorder(work):
    pool = load_pool(work)
    statistics = node_statistics(pool, np.arange(10))
    kept = largest_nodes(statistics.pool, pool.depth, 9)
    assert kept.sum() == 9 and all(kept[pool.parent[node]] for node in np.flatnonzero(kept) if node)
    order = preorder(pool.parent, kept, statistics.pool_share)
    assert sorted(order) == np.flatnonzero(kept).tolist() and order[0] == 0
    last = {}
    for node in order:
        above = pool.parent[node]
        assert node == 0 or above in last
        assert statistics.pool_share[node] <= last.get(above, np.inf)
        last[above], last[node] = statistics.pool_share[node], np.inf


def test_nodes_left_out_are_counted_where_they_hang(work, monkeypatch):
    monkeypatch.setattr(report_page, "MAX_NODES", 5)
    pool = load_pool(work)
    columns, place = node_columns(pool, node_statistics(pool, np.arange(10)))
    assert len(columns["parent"]) == 5 and place.min() == 0 and place.max() == 4
    assert columns["parent"][0] == -1 and all(0 <= up < i for i, up in enumerate(columns["parent"]) if i)


def test_samples_show_chosen_and_left_out_instances_of_every_tag(work):
    pool = load_pool(work)
    chosen = np.arange(0, 200, 4)
    rows, is_chosen = choose_samples(pool, chosen, 1000)
    np.testing.assert_array_equal(is_chosen, np.isin(rows, chosen))
    for group in (chosen, np.setdiff1d(np.arange(200), chosen)):
        shown = np.unique(pool.shares[np.intersect1d(rows, group)].indices)
        np.testing.assert_array_equal(shown, np.unique(pool.shares[group].indices))
    assert len(choose_samples(pool, chosen, 7)[0]) == 7


def test_summary_counts_everything_left_out(work):
    summary = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"] == {
        "rejected.jsonl": {HOSTILE: 3}, "failed.jsonl": {"refused": 1},
        "duplicates.jsonl": {"near-duplicates": 1}, "blend/unwritten.jsonl": {}, "contaminated.jsonl": {},
        "unwritable.jsonl": {},
    }  # fmt: skip
    assert [branch["name"] for branch in summary["branches"]][:1] == [HOSTILE]
    assert {branch["name"] for branch in summary["branches"]} == {HOSTILE, *TOPICS[1:]}
    assert sum(branch["selected_share"] for branch in summary["branches"]) == pytest.approx(1)
    assert summary["selection"]["instances"] == 40 and len(summary["blend"]["datasets"]) == 4
    assert (work / "report" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_page_needs_no_network_and_holds_no_foreign_markup(work):
    page = (work / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 3
    data, vendor, own = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    assert "ISC" in vendor or "Permission to use, copy" in vendor  # the libraries' licence goes with them
    rest = page.replace(data, "").replace(vendor, "")
    assert not re.search(r"src\s*=|@import|url\(|fetch\(|innerHTML|https?://|eval\(", rest)
    assert re.findall(r"[^.]\bhref\s*=", rest) == []
    for script in (vendor, own):
        assert _hash(script) in page
    assert json.loads(json_block({"a": HOSTILE})) == {"a": HOSTILE}
    assert not set("<>&\u2028") & set(json_block({HOSTILE: HOSTILE}))


def test_same_bytes_again(work):
    names = ("index.html", "overview.png", "summary.json")
    before = [(work / "report" / name).read_bytes() for name in names]
    report_step(work, target=work / "target")
    assert [(work / "report" / name).read_bytes() for name in names] == before


def test_counts_of_branches_agree_with_the_datasets(work):
    """Counts of every tag stood beside datasets in which an instance counts once, and nothing told them apart."""
    summary = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))
    written = {dataset["name"]: dataset["instances"] for dataset in summary["blend"]["datasets"]}
    assert {row["name"]: row["own_selected"] for row in summary["branches"]} == written
    assert sum(row["own"] for row in summary["branches"]) == 200 <= sum(row["pool"] for row in summary["branches"])


def test_sources_are_counted_by_hand(work):
    rows = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))["sources"]
    records = [json.loads(line) for line in (work / "records.jsonl").read_text(encoding="utf-8").split("\n") if line]
    pool = Counter(record["source"] for record in records[::2])
    chosen = Counter(records[2 * row["row"]]["source"] for row in read_jsonl(work / "selection.jsonl"))
    assert {row["name"]: (row["pool"], row["selected"]) for row in rows} == {
        name[:100]: (count, chosen[name]) for name, count in pool.items()
    }


def test_measures_are_those_of_a_count_by_hand(work):
    pool = load_pool(work, vectors=True)
    rows, branch = np.array([1, 5, 9]), np.where(np.arange(200) % 2, 3, 1)
    found = measure(pool, rows, branch, np.arange(200))
    mass = {}
    for row in range(200):
        for leaf in pool.leaves[pool.indptr[row] : pool.indptr[row + 1]]:
            mass.setdefault(int(leaf), []).append((row, 1 / (pool.indptr[row + 1] - pool.indptr[row])))
    own = {leaf: sum(part for row, part in parts if row in rows) for leaf, parts in mass.items()}
    whole = {leaf: sum(part for _, part in parts) for leaf, parts in mass.items()}
    assert found.distinct_tags == sum(value > 0 for value in own.values())
    covered = sum(whole[leaf] for leaf, value in own.items() if value) / sum(whole.values())
    assert found.tag_mass_covered == pytest.approx(covered)
    shares = [value / 3 for value in own.values() if value]
    assert found.effective_tags == pytest.approx(np.exp(-sum(share * np.log(share) for share in shares)))
    assert found.effective_branches == pytest.approx(1) and found.characters == 5
    random = random_measures(pool, 40, branch, np.arange(200))
    assert random.instances == 40 and random == random_measures(pool, 40, branch, np.arange(200))


def test_another_run_is_shown_beside_this_one_and_one_of_another_pool_is_refused(tmp_path):
    one, other = make_work_folder(tmp_path / "one"), make_work_folder(tmp_path / "other")
    sample_step(one, SampleSettings("40"), show_progress=False)
    sample_step(other, SampleSettings("20", method="random"), show_progress=False)
    summary = report_step(one, settings=ReportSettings(compare=str(other)))
    chosen, others = (set(read_selection(work).tolist()) for work in (one, other))
    assert summary["comparison"]["overlap"] == {
        "in both": len(chosen & others), "only here": len(chosen - others),
        "only in the other run": len(others - chosen), "not in this pool": 0,
    }  # fmt: skip
    assert set(summary["comparison"]["measures"]) == {"this selection", "random", "other run"}
    write_jsonl(other / "selection.jsonl", [{"row": 0, "id": "elsewhere/1", "gain": None}])
    with pytest.raises(UsageError, match="none of its 1 selected instances is in the pool"):
        report_step(one, settings=ReportSettings(compare=str(other)))


def test_points_of_a_large_pool_are_all_chosen_ones_and_random_others():
    chosen = np.arange(0, 1000, 50)
    rows = point_rows(1000, chosen, 100)
    assert len(rows) == 100 and np.isin(chosen, rows).all() and (np.diff(rows) > 0).all()
    assert (point_rows(1000, chosen, 100) == rows).all() and len(point_rows(1000, chosen, 1000)) == 1000
    many = point_rows(1000, np.arange(900), 100)
    assert len(many) == 100 and (many < 900).sum() == 50


def test_the_map_puts_like_instances_together_and_is_the_same_again(work):
    pool = load_pool(work, vectors=True)
    topic = pool.parent[pool.leaves[pool.indptr[:-1]]]
    places = Map(pool).place(pool, np.arange(200)).astype(float)
    assert (places == Map(pool).place(pool, np.arange(200))).all()
    assert (places[[7, 9]] == Map(pool).place(pool, np.array([7, 9]))).all()
    means = np.array([places[topic == node].mean(0) for node in np.unique(topic)])
    within = np.mean([np.linalg.norm(places[topic == node] - means[i], axis=1).mean()
                      for i, node in enumerate(np.unique(topic))])  # fmt: skip
    between = np.linalg.norm(places - places.mean(0), axis=1).mean()
    assert within < between and np.ptp(places, axis=0).min() > 20_000


def test_typical_instances_come_first_from_every_branch(work, monkeypatch):
    """The vectors of all instances of a branch were in memory together: a third of the peak at a million."""
    pool = load_pool(work, vectors=True)
    branch = np.arange(200) % 4
    is_chosen = np.arange(200) % 3 == 0
    rows = typical_rows(pool, branch, is_chosen)
    assert len(rows) == len(set(rows.tolist())) == 4 * 2 * 6
    assert Counter(zip(branch[rows].tolist(), is_chosen[rows].tolist(), strict=True)).keys() == {
        (node, chosen) for node in range(4) for chosen in (True, False)
    }
    monkeypatch.setattr("megatron_ksa.data_tools.tags.report_data.HELD_ROWS", 8)
    monkeypatch.setattr("megatron_ksa.data_tools.tags.branches.ROWS_AT_ONCE", 8)
    np.testing.assert_array_equal(typical_rows(pool, branch, is_chosen), rows)
    picked, _ = choose_samples(pool, np.flatnonzero(is_chosen), 60, rows)
    assert np.isin(rows, picked).all()


def test_instances_with_evaluation_data_are_left_out_or_only_shown(tmp_path):
    work = make_work_folder(tmp_path)
    rows = [
        {"id": "r1", "reason": "n-grams", "left_out": True, "text": "a"},
        {"id": "r2", "reason": "n-grams", "left_out": False},
    ]
    write_jsonl(work / "contaminated.jsonl", rows)
    assert report_audit.left_out(work) == {"contaminated.jsonl": {"n-grams": 1}}
    shown = report_audit.contaminated(work)
    assert (shown["total"], shown["columns"]) == (2, ["id", "reason", "left_out", "text"])


def test_audit_shows_merges_duplicates_with_their_texts_and_settings(tmp_path):
    work = make_work_folder(tmp_path)
    write_jsonl(work / "tag_merges.jsonl", ({"tag": f"t{i}", "into": "t", "reason": "meaning"} for i in range(5000)))
    write_jsonl(work / "duplicates.jsonl", [{"id": "r3", "kept": "r1", "similarity": 0.91, "new_column": [1]}])
    merged, pairs = report_audit.merges(work), report_audit.duplicates(work)
    assert merged["total"] == 5000 and 1000 < len(merged["rows"]) <= 2000
    assert pairs["columns"] == ["id", "kept", "similarity", "new_column", "text", "text of the one kept"]
    assert "Question 3?" in pairs["rows"][0][4] and "Question 1?" in pairs["rows"][0][5]
    assert report_audit.settings(work)["rows"] == []


def test_settings_have_the_names_of_flags(tmp_path):
    """They had the names of fields, such as `rare` and `keep`, and nothing told which files were read."""
    canonicalise = {"settings": {"rare": 2}, "inputs": {"tags.jsonl": "x"}}
    read = {"settings": {"max_bytes": 5}, "inputs": {"input:0:a:b.jsonl": "x"}}
    sample = {"settings": {"budget": "5%", "unknown": 1}, "inputs": {"tokenizer:": "x", "../tree.npz": "x"}}
    decontaminate = {"settings": {}, "inputs": {"evaluation:0:test.jsonl": "x", "target/records.jsonl": "x"}}
    steps = {"canonicalise": canonicalise, "decontaminate": decontaminate, "read": read, "sample": sample}
    write_json(tmp_path / "manifest.json", {"version": 1, "steps": steps})
    write_json(tmp_path / "target" / "manifest.json", {"version": 1, "steps": {"read": read}})
    assert report_audit.settings(tmp_path)["rows"] == [
        ["decontaminate", "--decontaminate", "test.jsonl"], ["read", "--input", "a:b.jsonl"],
        ["read", "--target", "a:b.jsonl"], ["canonicalise", "--rare-tags", 2], ["read", "--max-record-bytes", 5],
        ["sample", "--budget", "5%"], ["sample", "unknown", 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "datasets", "instances", "note"),
    [
        (None, [], 0, "Own: each instance counts in one branch."),
        ({"group_by": "branch"}, ["a"], 9, "that of its dataset."),
        ({"group_by": "branch"}, ["a", "rest"], 7, "dataset named rest. Selected, but in no dataset: 2 (see Counts)"),
        ({"group_by": "source"}, ["a"], 9, "the datasets are sources."),
    ],
)  # fmt: skip
def test_the_note_on_own_counts_is_true_of_the_datasets(settings, datasets, instances, note):
    """It called a branch the instances' dataset where datasets were sources, and where some were not written."""
    blend = {"settings": settings, "datasets": [{"name": name} for name in datasets], "instances": instances}
    assert note in _own_note(None if settings is None else blend, 9)


def test_one_far_group_leaves_the_map_no_empty_half():
    """Two thirds of a real pool's map were empty, because one branch lay far from all others."""
    places = np.concatenate([np.random.default_rng(0).normal(size=(50, 2)), [[100.0, 0.0], [100.0, 0.5]]])
    spread = _spread_out(places)
    assert spread.min() == 0 and spread.max() == 1 and np.median(spread[:, 0]) > 0.2
    assert (np.argsort(spread[:50, 0]) == np.argsort(places[:50, 0])).all() and spread[50, 0] == spread[51, 0]
    # A pool of one lies in the middle, and not in a corner.
    assert (_spread_out(np.zeros((3, 2))) == 0.5).all() and (_spread_out(places * [1, 0])[:, 1] == 0.5).all()


@pytest.mark.parametrize(("flags", "message"), [(("--compare", "nowhere"), "--compare nowhere: no selection.jsonl"),
                                                (("--report-points", "0"), "--report-points 0")])  # fmt: skip
def test_flags_of_the_report_that_cannot_work_cost_one_line(flags, message, tmp_path, call):
    code, _, error = call("report", "--work", make_work_folder(tmp_path / "w"), *flags)
    assert code == 2 and message in error
