"""Duplicates: what is one, which copy stays, and what only looks like one."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ksa.data_tools.tags import duplicates, minhash
from megatron_ksa.data_tools.tags.compared import compared_words, telling
from megatron_ksa.data_tools.tags.duplicates import SCRATCH, DuplicateSettings, find_duplicates, shared_shingles
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.near_pairs import BandFiles, band_pairs, memory_pairs, packed
from megatron_ksa.data_tools.tags.read import read
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.errors import UsageError

CASES = Path(__file__).with_name("cases")
WORDS = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(400)]


def write_records(folder: Path, bodies: list[dict], quality: list[float | None] | None = None) -> Path:
    """Records `s/0`, `s/1`, ... with the bodies, all tagged, with scores."""
    folder.mkdir(exist_ok=True)
    quality = quality or [None] * len(bodies)
    scores = [{"quality": score, "difficulty": None} for score in quality]
    rows = list(zip(bodies, scores, strict=True))
    write_jsonl(folder / "records.jsonl", (
        {"id": f"s/{n}", "source": "s", **body, **score, "tags": None} for n, (body, score) in enumerate(rows)
    ))  # fmt: skip
    write_jsonl(folder / "tags.jsonl", ({"id": f"s/{n}", "tags": ["a"], **score} for n, (_, score) in enumerate(rows)))
    return folder


def chat(asked: str, answered: str, system: str | None = None) -> dict:
    turns = [("system", system), ("user", asked), ("assistant", answered)]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text is not None]}


def left_out(folder: Path, total: int, engine: Engine | None = None, **settings) -> dict[int, int]:
    """Numbers of the records that are left out, with those that stand for them."""
    counts = find_duplicates(folder, DuplicateSettings(**settings), engine or Engine(), total)
    rows = list(read_jsonl(folder / "duplicates.jsonl"))
    assert counts["duplicates"] == len(rows) and not (folder / SCRATCH).exists()
    return {int(row["id"][2:]): int(row["kept"][2:]) for row in rows}


def from_case(folder: Path, name: str) -> int:
    """The records of a case, tagged; returns how many."""
    folder.mkdir(exist_ok=True)
    total = read([CASES / name], folder, RecordSettings(), Engine())["records"]
    rows = ({"id": row["id"], "tags": ["a"], "quality": None, "difficulty": None}
            for row in read_jsonl(folder / "records.jsonl"))  # fmt: skip
    write_jsonl(folder / "tags.jsonl", rows)
    return total


def test_near_duplicates_are_those_of_exact_jaccard(tmp_path):
    generator = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        text = list(generator.choice(WORDS, 200))
        near, far = list(text), list(text)
        near[5] = "changed"
        far[::6] = ["changed"] * len(far[::6])
        texts += [" ".join(text), " ".join(near), " ".join(far)]
    write_records(tmp_path, [{"text": text} for text in texts])
    assert left_out(tmp_path, 120, shared=1.0) == {n + 1: n for n in range(0, 120, 3)}
    for row in read_jsonl(tmp_path / "duplicates.jsonl"):
        words = [texts[int(row[key][2:])].split() for key in ("id", "kept")]
        sets = [set(zip(*(each[k:] for k in range(5)), strict=False)) for each in words]
        assert row["similarity"] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]), abs=1e-4)
        assert row["kind"] == "near"
    assert left_out(tmp_path, 120, similarity=0.0) == {}
    assert left_out(tmp_path, 120, similarity=1.0) == {}


def test_a_shared_system_prompt_makes_no_duplicates(tmp_path):
    """19 of 20 different questions were left out because one system prompt stood before all of them."""
    assert left_out(tmp_path, from_case(tmp_path, "shared_system_prompt.jsonl")) == {}


def test_a_shared_prompt_in_the_user_turn_makes_no_duplicates(tmp_path):
    """The same with the prompt where templates put it: shingles that many instances share do not count."""
    generator = np.random.default_rng(0)
    shared = " ".join(generator.choice(WORDS, 300))
    bodies = [chat(f"{shared} {' '.join(generator.choice(WORDS, 20))}", "certainly") for _ in range(30)]
    write_records(tmp_path, bodies)
    assert len(left_out(tmp_path, 30, shared=1.0)) == 29
    assert left_out(tmp_path, 30) == {}


def test_operators_and_digits_are_words(tmp_path):
    """48 different calculations were copies of each other at similarity 1.0."""
    total = from_case(tmp_path, "operators.jsonl")
    assert total == 48 and left_out(tmp_path, total, shared=1.0) == {} and left_out(tmp_path, total) == {}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The answer is B.", "The answer is C.", False), ("the sum is 41", "the sum is 42", False),
        ("it is so", "it isn't so", False), ("x >= y holds", "x <= y holds", False),
        ("so it is, of course,", "so it is of course", True),
    ],
)  # fmt: skip
def test_another_answer_is_no_duplicate(tmp_path, one, other, same):
    """1,278 of 3,949 removed records had another answer: the last word differed in a hundred."""
    generator = np.random.default_rng(0)
    asked, thoughts = (" ".join(generator.choice(WORDS, 100)) for _ in range(2))
    write_records(tmp_path, [chat(asked, f"{thoughts} {end}") for end in (one, other)])
    assert (left_out(tmp_path, 2) == {1: 0}) == same


def test_another_question_with_the_same_answer_is_no_duplicate(tmp_path):
    generator = np.random.default_rng(0)
    answer = " ".join(generator.choice(WORDS, 100))
    write_records(tmp_path, [chat(f"What is the capital of {name}?", answer) for name in ("France", "Spain")])
    assert left_out(tmp_path, 2) == {}


@pytest.mark.parametrize(
    "text", ["机器学习是人工智能的一个分支它使用算法从数据中学习", "こんにちは世界今日はとても良い天気ですね"]
)
def test_scripts_without_blanks_are_compared_by_character(tmp_path, text):
    """A Chinese or Japanese text was one word: near-copies had nothing in common."""
    bodies = [{"text": text * 1 + "完了" * k} for k in (1, 2)]
    write_records(tmp_path, [*bodies, {"text": text[::-1]}])
    assert left_out(tmp_path, 3) == {1: 0}


def test_the_best_scored_copy_stays_and_among_equals_the_first(tmp_path):
    """The first copy stayed, whatever its score."""
    text = " ".join(np.random.default_rng(0).choice(WORDS, 60))
    bodies = [{"text": text}, {"text": text + " more"}, {"text": text}, {"text": text}, {"text": "other words"}]
    write_records(tmp_path, bodies, [3.0, 9.0, None, 3.0, 1.0])
    assert left_out(tmp_path, 5) == {0: 1, 2: 1, 3: 1}
    write_records(tmp_path, bodies)
    assert left_out(tmp_path, 5) == {1: 0, 2: 0, 3: 0}
    rows = {row["id"]: row["kind"] for row in read_jsonl(tmp_path / "duplicates.jsonl")}
    assert rows == {"s/1": "near", "s/2": "exact", "s/3": "exact"}


def test_exact_copies_are_found_whatever_the_white_space_and_with_system_turns_that_differ_kept_apart(tmp_path):
    """A blank at the end of a turn once made two contents of one; `\\nu` was `\\tu`, taken for white space."""
    bodies = [chat("a  question", "an\nanswer ", "be kind"), chat("a question", "an answer", "be kind")]
    write_records(tmp_path, bodies)
    assert left_out(tmp_path, 2, similarity=1.0) == {1: 0}
    write_records(tmp_path, [chat("a question", "the \\nu x"), chat("a question", "the \\tu x")])
    assert left_out(tmp_path, 2, similarity=1.0) == {}
    write_records(tmp_path, [chat("a question", "an answer", "be kind"), chat("a question", "an answer", "be brief")])
    assert left_out(tmp_path, 2, similarity=1.0) == {}


def test_tool_calls_are_part_of_the_answer(tmp_path):
    def calls(city: str) -> dict:
        call = [{"function": {"name": "weather", "arguments": {"city": city}}}]
        turns = [{"role": "user", "content": "How is the weather there?"}, {"role": "assistant", "tool_calls": call}]
        return {"messages": turns}

    write_records(tmp_path, [calls("Rome"), calls("Oslo"), calls("Rome")])
    assert left_out(tmp_path, 3) == {2: 0}


def test_a_warning_tells_when_much_is_left_out_and_gives_examples(tmp_path, capsys):
    bodies = [{"text": "the very same words"}] * 12 + [{"text": f"another text {word}"} for word in WORDS[:12]]
    write_records(tmp_path, bodies)
    left_out(tmp_path, 24)
    told = capsys.readouterr().err
    assert "warning: 11 of 24 instances are left out as duplicates (--duplicate-similarity 0.8)" in told
    assert "s/1: the very same words | s/0: the very same words" in told
    left_out(tmp_path, 24, warn_share=0.9)
    assert "warning: 11 of 24 instances are left out as duplicates of one" in capsys.readouterr().err
    left_out(tmp_path, 24, warn_share=0.9, warn_cluster=0.9)
    assert "warning" not in capsys.readouterr().err


def test_workers_and_shards_write_the_same_bytes(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 30)) for _ in range(60)]
    bodies = [{"text": f"{texts[n % 60]}{' again' * (n // 60)}"} for n in range(240)]
    write_records(tmp_path, bodies, [float(generator.integers(1, 11)) for _ in bodies])
    first = left_out(tmp_path, 240)
    assert len(first) > 100
    content = (tmp_path / "duplicates.jsonl").read_bytes()
    monkeypatch.setattr("megatron_ksa.data_tools.tags.near_pairs.PAIRS_PER_SHARD", 7)
    monkeypatch.setattr(duplicates, "RECORDS_PER_TASK", 11)
    left_out(tmp_path, 240)
    assert (tmp_path / "duplicates.jsonl").read_bytes() == content
    left_out(tmp_path, 240, Engine(workers=2))
    assert (tmp_path / "duplicates.jsonl").read_bytes() == content


def test_semantic_duplicates_have_other_words_in_common_order_but_the_same_numbers(tmp_path):
    generator = np.random.default_rng(0)
    topics = [generator.choice(WORDS, 40, replace=False) for _ in range(30)]
    bodies = [{"text": " ".join(topic)} for topic in topics]
    bodies += [{"text": " ".join(generator.permutation(topic))} for topic in topics]
    bodies += [chat(" ".join(topics[0]), f"in all {number} of them") for number in (7, 8)]
    write_records(tmp_path, bodies)
    assert left_out(tmp_path, 62) == {}
    found = left_out(tmp_path, 62, semantic=0.97)
    assert found == {30 + n: n for n in range(30)}
    assert {row["kind"] for row in read_jsonl(tmp_path / "duplicates.jsonl")} == {"semantic"}


def test_what_a_killed_run_left_changes_nothing(tmp_path):
    text = " ".join(np.random.default_rng(0).choice(WORDS, 60))
    write_records(tmp_path, [{"text": text}, {"text": text + " more"}])
    (tmp_path / SCRATCH).mkdir()
    for name in ("keys-0.u64", "pairs-0.u64", "exact", "quality", "offset", "vectors"):
        (tmp_path / SCRATCH / name).write_bytes(b"left by a run that was killed")
    assert left_out(tmp_path, 2) == {1: 0}


def test_shared_shingles_are_counted_once_an_exact_copy(tmp_path):
    bodies = [{"text": "one text that is there again and again"}] * 50 + [
        {"text": f"{word} {word}"} for word in WORDS[:50]
    ]
    write_records(tmp_path, bodies)
    assert len(shared_shingles(tmp_path, 0.02, Engine(), 100)) == 0


def test_telling_words():
    assert telling(compared_words("It isn't 3 + x, I'd say: a cat's B2 can't")) == ("+", "3", "b2", "not", "not", "x")


def test_signatures_estimate_jaccard_and_bands_find_pairs_above_the_similarity():
    generator = np.random.default_rng(0)
    for wanted in (0.5, 0.8, 0.9):
        shared = round(200 * 2 * wanted / (1 + wanted))
        missed, errors = 0, []
        for _ in range(60):
            values = generator.integers(0, 1 << 63, 400 - shared, dtype=np.uint64)
            pair = np.concatenate([values[:200], values[200 - shared :]])
            found = minhash.signatures(pair, np.array([0, 200, 400]))
            errors.append((found[0] == found[1]).mean() - shared / (400 - shared))
            keys = minhash.band_keys(found, 0.8)
            missed += not (keys[:, 0] == keys[:, 1]).any()
        assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06
        if wanted >= 0.8:
            assert missed <= 1
    assert (minhash.signatures(np.empty(0, np.uint64), np.array([0, 0])) == 0xFFFFFFFF).all()


def test_pairs_of_small_groups_are_all_and_of_large_ones_few(tmp_path):
    keys = np.array([5, 7, 5, 9, 5, 7], np.uint64)
    expected = packed(np.array([2, 4, 4, 5]), np.array([0, 0, 2, 1]))
    np.testing.assert_array_equal(band_pairs(keys), expected)
    np.testing.assert_array_equal(memory_pairs([keys, keys[::-1].copy()]), np.unique(np.concatenate([
        expected, packed(np.array([3, 5, 5, 4]), np.array([1, 1, 3, 0]))])))  # fmt: skip
    many = band_pairs(np.zeros(10_000, np.uint64))
    assert 9_999 <= len(many) <= 100_000
    files = BandFiles(tmp_path, 1)
    files.write(keys[None])
    files.close()
    np.array([0, 1, 2, 3, 4, -1]).tofile(tmp_path / "texts")
    assert list(files.find_pairs(tmp_path / "texts", Engine())) == [3]
    np.testing.assert_array_equal(files.shard_pairs(0, 6), expected[:3])


@pytest.mark.parametrize(
    "settings", [{"similarity": -0.1}, {"shared": 1.5}, {"warn_share": 2.0}, {"warn_cluster": -1.0}]
)
def test_bad_settings(settings):
    with pytest.raises(UsageError, match="from 0 to 1"):
        DuplicateSettings(**settings)


def test_rows_that_do_not_follow_the_records_are_told(tmp_path):
    write_records(tmp_path, [{"text": "one"}, {"text": "two"}])
    rows = [json.dumps({"id": name, "tags": ["a"], "quality": None, "difficulty": None}) for name in ("s/1", "s/0")]
    (tmp_path / "tags.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(UsageError, match="'s/0' is not in records.jsonl in this order"):
        find_duplicates(tmp_path, DuplicateSettings(), Engine(), 2)
