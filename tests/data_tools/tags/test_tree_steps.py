"""Keyphrases, duplicates, canonical tags, the tree and grounding, each against what its definition says."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from raw_pool import TOPICS
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags import canonicalise, ground, tree
from megatron_ksa.data_tools.tags.canonicalise import (
    CanonicalSettings,
    by_frequency,
    fold,
    merge_meanings,
    merge_spellings,
    nearest,
)
from megatron_ksa.data_tools.tags.clustering import blocks, refine_by_instances
from megatron_ksa.data_tools.tags.embed import LatentEmbedder, enough_instances, unit
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.ground import GroundSettings
from megatron_ksa.data_tools.tags.taggers.keyphrase import KeyphraseTagger, phrases
from megatron_ksa.data_tools.tags.tree import Tree, TreeSettings, build_tree, load_tree
from megatron_ksa.errors import UsageError


def write_tagged(folder: Path, rows: list[tuple[str, list[str]]]) -> Path:
    """Records `s/0`, `s/1`, ... of texts with tags, all tagged."""
    folder.mkdir(exist_ok=True)
    common = {"quality": None, "difficulty": None}
    write_jsonl(folder / "records.jsonl", (
        {"id": f"s/{n}", "source": "s", "text": text, **common, "tags": None} for n, (text, _) in enumerate(rows)
    ))  # fmt: skip
    write_jsonl(folder / "tags.jsonl", ({"id": f"s/{n}", "tags": tags, **common} for n, (_, tags) in enumerate(rows)))
    write_jsonl(folder / "duplicates.jsonl", [])
    return folder


def topic_rows(count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Texts of the topics in turn, tagged with three of their words."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(count):
        words = generator.choice(list(TOPICS.values())[number % len(TOPICS)].split(), 20)
        rows.append((" ".join(words), [str(word) for word in words[:3]]))
    return rows


def built(folder: Path, rows: list[tuple[str, list[str]]], **shape) -> Path:
    """A work folder after the tree step."""
    write_tagged(folder, rows)
    canonicalise.canonicalise(folder, CanonicalSettings(), Engine())
    tree.tree(folder, TreeSettings(**shape))
    ground.ground(folder, folder, GroundSettings(), Engine())
    return folder


def test_phrases_hold_no_stop_word_number_or_punctuation():
    found = phrases("The rye bread, and a C++ oven in 2024.")
    assert found == ["rye", "bread", "rye bread", "c++", "oven", "c++ oven"]


def test_keyphrases_are_shared_telling_and_none_is_part_of_another(tmp_path):
    texts = ["sourdough bread needs patience", "sourdough bread needs salt"] * 6 + ["only here: xylophone quartet"]
    write_tagged(tmp_path, [(text, []) for text in texts])
    answers = list(KeyphraseTagger(3, Engine()).answers(tmp_path / "records.jsonl", len(texts)))
    assert "sourdough bread" in answers[0].tags and answers[0] == answers[2]
    for answer in answers[:-1]:
        assert 1 <= len(answer.tags) <= 3
        assert not any(f" {a} " in f" {b} " for a in answer.tags for b in answer.tags if a != b)
    assert answers[-1].reason == "no keyphrase"
    pooled = KeyphraseTagger(3, Engine(), pool=tmp_path / "records.jsonl")
    target = write_tagged(tmp_path / "target", [("salt and xylophone", [])])
    assert next(pooled.answers(target / "records.jsonl", 1)).tags == ["salt"]
    with pytest.raises(UsageError, match="--tags-per-record 0"):
        KeyphraseTagger(0, Engine())


@pytest.mark.parametrize(
    ("tag", "folded"),
    [
        ("  Machine-Learning ", "machine learning"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁle_name", "file name"),
        ("C++", "c++"),
    ],
)
def test_folding(tag, folded):
    assert fold(tag) == folded


def test_spellings_merge_into_the_more_frequent_but_other_numbers_do_not():
    names = ["linear regression", "linear regressions", "python 2 packages", "python 3 packages", "chess"]
    order = by_frequency(names, np.array([2, 5, 4, 3, 9]))
    merged = merge_spellings(names, order, 0.7, Engine())
    assert {tag: into for tag, (into, _) in merged.items()} == {0: 1}
    assert not merge_spellings(names, order, 0, Engine())


def test_meanings_merge_into_one_that_stays():
    """b is near a and c near b, but c is not near a: c stays, since b does not."""
    angles = np.radians([0, 20, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    merged = merge_meanings(vectors, np.arange(3), float(np.cos(np.radians(21))))
    assert {tag: into for tag, (into, _) in merged.items()} == {1: 0}


def test_every_spelling_ends_in_the_vocabulary_and_counts_add_up(tmp_path):
    rows = topic_rows(80)
    rows[0][1][:] = ["BREAD", "bread"]
    rows[1][1].append("seen only once")
    work = built(tmp_path / "w", rows)
    vocabulary = {row["tag"]: row["count"] for row in read_jsonl(work / "vocabulary.jsonl")}
    merges = {row["tag"]: row for row in read_jsonl(work / "tag_merges.jsonl")}
    assert merges["BREAD"]["reason"] == "folding" and merges["seen only once"]["reason"] == "rare"
    count = dict.fromkeys(vocabulary, 0)
    for _, tags in rows:
        ends = set()
        for tag in tags:
            while tag not in vocabulary:
                tag = merges[tag]["into"]
            ends.add(tag)
        for tag in ends:
            count[tag] += 1
    assert count == vocabulary and min(count.values()) >= 2
    vectors = np.load(work / "embeddings.npy")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def check_tree(found: Tree, counts: np.ndarray) -> None:
    """What data_tools/tags/README.md promises of every tree."""
    assert found.parent[0] == -1 and (found.parent[1:] < np.arange(1, len(found.parent))).all()
    assert (found.depth[1:] == found.depth[found.parent[1:]] + 1).all() and (np.diff(found.depth) >= 0).all()
    children = np.bincount(found.parent[1:], minlength=len(found.parent))
    assert (children[found.tag >= 0] == 0).all() and (children[1:][found.tag[1:] < 0] >= 2).all()
    assert sorted(found.tag[found.tag >= 0]) == list(range(len(counts)))
    total = np.zeros(len(found.parent), np.int64)
    total[found.leaf_of_tag] = counts
    for node in range(len(total) - 1, 0, -1):
        total[found.parent[node]] += total[node]
    assert (total == found.count).all()


@pytest.mark.parametrize(
    "shape", [{}, {"branching": 3}, {"top": 4, "branching": 5}, {"levels": 1}, {"levels": 2, "branching": 2}]
)
@pytest.mark.parametrize("tags", [1, 2, 30, 700])
def test_any_tree_is_one(tags, shape):
    generator = np.random.default_rng(tags)
    vectors, counts = unit(generator.normal(size=(tags, 16))), generator.integers(1, 9, tags)
    found = build_tree([f"t{n}" for n in range(tags)], counts, vectors, TreeSettings(**shape))
    check_tree(found, counts)
    assert found.depth.max() <= TreeSettings(**shape).levels
    assert set(found.name[1:]) <= {f"t{n}" for n in range(tags)} and found.name[0] == "root"


def test_equal_vectors_and_blocks():
    counts = np.ones(5000, np.int64)
    check_tree(
        build_tree([str(n) for n in range(5000)], counts, np.ones((5000, 4), np.float32) / 2, TreeSettings()), counts
    )
    parts = blocks(unit(np.random.default_rng(0).normal(size=(5000, 8))), size=600)
    assert max(map(len, parts)) <= 600 and sorted(np.concatenate(parts)) == list(range(5000))


def test_planted_groups_are_the_top_branches_named_by_their_middle():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 30)
    vectors = unit(np.eye(4)[group] + 0.05 * generator.normal(size=(120, 4)))
    found = build_tree(
        [f"{g} {n}" for n, g in enumerate(group)], np.ones(120, int), vectors, TreeSettings(top=4, branching=30)
    )
    branch = found.branch_at(1)[found.leaf_of_tag]
    assert len(set(zip(group, branch, strict=True))) == 4
    assert {found.name[node][0] for node in set(branch)} == {"0", "1", "2", "3"}
    for node in set(branch):
        members = np.flatnonzero(branch == node)
        middle = members[(vectors[members] @ vectors[members].mean(axis=0)).argmax()]
        assert found.name[node] == f"{group[middle]} {middle}"


def test_levels_follow_instances_where_there_are_enough():
    """Two centres that sit on outlying tags move to where the instances are; too few instances move nothing."""
    generator = np.random.default_rng(0)
    instances = unit(np.eye(3)[np.repeat([0, 1], 100)] + 0.05 * generator.normal(size=(200, 3)))
    tags = unit(np.array([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0, 1, 0], [0.5, 0.4, 0.8]]))
    labels = np.array([0, 0, 0, 0, 1])
    centres = unit(np.array([[1, 0.2, 0], [0.5, 0.4, 0.8]]))
    moved = refine_by_instances(tags, instances, centres, labels)
    assert moved[0] == moved[1] != moved[2] == moved[3]
    assert refine_by_instances(tags, instances[:60], centres, labels) is labels


def test_a_saved_tree_is_the_same_and_another_file_is_refused(tmp_path):
    found = build_tree(["a", "b", "c"], np.array([3, 2, 1]), unit(np.eye(3)), TreeSettings())
    found.save(tmp_path / "tree.npz")
    for name, array in vars(load_tree(tmp_path / "tree.npz")).items():
        np.testing.assert_array_equal(array, getattr(found, name))
    np.savez(tmp_path / "other.npz", parent=np.zeros(2))
    with pytest.raises(UsageError, match="no array depth, name, tag, count"):
        load_tree(tmp_path / "other.npz")


def test_grounding_puts_every_instance_on_the_leaves_of_its_tags(tmp_path):
    rows = topic_rows(80)
    work = built(tmp_path / "w", rows)
    grounding, found = read_arrays(work / "grounding.npz"), load_tree(work / "tree.npz")
    names = [row["tag"] for row in read_jsonl(work / "vocabulary.jsonl")]
    merges = {row["tag"]: row["into"] for row in read_jsonl(work / "tag_merges.jsonl")}
    for number, line in enumerate(grounding["record"]):
        text, tags = rows[line]
        leaves = grounding["leaves"][grounding["indptr"][number] : grounding["indptr"][number + 1]]
        assert {names[tag] for tag in found.tag[leaves]} == {tag if tag in names else merges[tag] for tag in tags}
        assert (np.diff(leaves) > 0).all() and grounding["length"][number] == len(text)


def test_new_data_lands_on_an_old_tree_or_is_listed(tmp_path):
    work = built(tmp_path / "w", topic_rows(200))
    new = write_tagged(tmp_path / "new", [
        ("bread dough yeast oven", ["Bread", "dough yeast"]), ("quark lepton", ["quark lepton"]), ("chess", ["rook"]),
    ])  # fmt: skip
    counts = ground.ground(new, work, GroundSettings(), Engine())
    placed = {row["tag"]: row["into"] for row in read_jsonl(new / "placed_tags.jsonl")}
    assert placed.keys() == {"dough yeast"} and placed["dough yeast"] in TOPICS["baking"].split()
    assert [row["id"] for row in read_jsonl(new / "unplaced.jsonl")] == ["s/1"] and counts["instances"] == 2
    assert read_arrays(new / "grounding.npz")["record"].tolist() == [0, 2]
    with pytest.raises(UsageError, match="none of its tags is on the tree"):
        ground.ground(write_tagged(tmp_path / "far", [("quark", ["quark"])]), work, GroundSettings(), Engine())


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (CanonicalSettings, {"merge_spelling": -1}, "--merge-spelling"),
        (CanonicalSettings, {"merge_cosine": 0}, "--merge-cosine"),
        (CanonicalSettings, {"rare": 0}, "--rare-tags"),
        (TreeSettings, {"branching": 1}, "--branching"),
        (TreeSettings, {"top": 1}, "--top-branches"),
        (TreeSettings, {"levels": 0}, "--levels"),
        (GroundSettings, {"cosine": 2}, "--place-cosine"),
    ],
)
def test_bad_settings(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(**changes)


def test_enough_instances_are_taken_of_every_tag_and_few_more():
    generator = np.random.default_rng(0)
    dense = generator.random((400, 30)) < np.linspace(0.01, 0.9, 30)
    wanted = enough_instances(csr_array(dense.astype(np.int8)), 8)
    assert (dense[wanted].sum(axis=0) >= np.minimum(dense.sum(axis=0), 8)).all() and wanted.sum() < 200


def test_a_rare_tag_that_is_near_to_no_kept_one_stays(tmp_path):
    """Rare tags were folded into the nearest kept tag, however far away that was."""
    rows = [*topic_rows(40), ("xylophone quartet plays", ["xylophone"])]
    for floor, stays in ((0.0, False), (1.0, True)):
        write_tagged(tmp_path, rows)
        canonicalise.canonicalise(tmp_path, CanonicalSettings(rare_cosine=floor), Engine())
        assert ("xylophone" in {row["tag"] for row in read_jsonl(tmp_path / "vocabulary.jsonl")}) == stays
    with pytest.raises(UsageError, match="--rare-cosine"):
        CanonicalSettings(rare_cosine=2.0)


def test_tags_are_embedded_in_one_array_of_their_vectors():
    """Six copies of [tags, dimensions] were held at once: 3 KB a tag, most of the memory of a pool with many tags."""
    tags, dimensions = 20_000, 64

    class Fake(LatentEmbedder):
        def _vectors(self, texts, total, what):
            for first in range(0, total, 500):
                yield unit(np.random.default_rng(first).normal(size=(min(500, total - first), dimensions)))

    carried = csr_array(scipy.sparse.random(tags, 30_000, 1e-4, "csr", np.int8, np.random.default_rng(0)) != 0)
    embedder = Fake(None, np.zeros((dimensions, 1), np.float32), Engine())
    tracemalloc.start()
    vectors = embedder.embed(["tag"] * tags, carried, lambda wanted: [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert vectors.nbytes < peak < 2.5 * vectors.nbytes
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_nearest_by_blocks_is_nearest(monkeypatch):
    monkeypatch.setattr(canonicalise, "AMONG_AT_ONCE", 7)
    monkeypatch.setattr(canonicalise, "ROWS_AT_ONCE", 4)
    vectors = unit(np.random.default_rng(0).normal(size=(60, 5)))
    rows, of = np.arange(0, 60, 3), np.arange(1, 60, 2)
    found, cosine = nearest(vectors, vectors, rows, of)
    dense = vectors[rows] @ vectors[of].T
    np.testing.assert_allclose(cosine, dense.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(found, dense.argmax(axis=1))
    assert len(nearest(vectors[:0], vectors)[0]) == 0


def test_rows_are_saved_as_numpy_saves_them(tmp_path, monkeypatch):
    monkeypatch.setattr(canonicalise, "AMONG_AT_ONCE", 7)
    vectors, rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), np.arange(1, 50, 2)
    canonicalise._save_rows(tmp_path / "some.npy", vectors, rows)
    np.save(tmp_path / "all.npy", vectors[rows])
    assert (tmp_path / "some.npy").read_bytes() == (tmp_path / "all.npy").read_bytes()
