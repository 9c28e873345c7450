"""The offline tagger: noun phrases that records share, in scripts with spaces and without, and nothing else."""

import sys

import numpy as np
import pytest
from test_endpoint_tagger import write_records

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.taggers import Answer, Failure, segment
from megatron_ksa.data_tools.tags.taggers.keyphrase import KeyphraseTagger, contained_grams, phrases
from megatron_ksa.data_tools.tags.taggers.segment import segments
from megatron_ksa.errors import UsageError


def tags(folder, texts: list[str], **changes) -> list[Answer | Failure]:
    records = write_records(folder, texts)
    return list(KeyphraseTagger(6, Engine("local", 1), **changes).answers(records, len(texts)))


def flat(text: str) -> set[str]:
    return {word for phrase in phrases(text) for word in phrase.split()}


@pytest.mark.parametrize(
    "text",
    [
        "Who's there? I'm here, thanks! You're welcome, hello, don't, can’t, they'll, we've, it's",
        "see http://example.com/a/b.png?x=1, www.example.org/index.html or example.com, mail me@example.net",
        "<div class='a'><br/><img src=\"x.png\" alt='y'>&nbsp;&amp;</div> <|im_start|> [b] [/b]",
        r"\begin \frac \mathbb \text",
        "write explain calculate gave written taking quickly very please",
        "com png jpg http https www html 12 3.14 2024-01-02",
        "beautiful different available important",
    ],
)  # fmt: skip
def test_contractions_addresses_markup_verbs_and_greetings_are_no_tags(text):
    """Branches were called png, who's, i'm, thanks and com."""
    assert phrases(text) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Newton's law of universal gravitation", {"newton", "law", "universal gravitation", "gravitation"}),
        ("parse C++ and C# source code with GPT-4", {"c++", "c#", "source code", "gpt-4"}),
        ("l'équation d'Einstein", {"équation", "einstein"}),
        ("हिन्दी व्याकरण", {"हिन्दी", "व्याकरण", "हिन्दी व्याकरण"}),
        ("Решите квадратное уравнение", {"квадратное", "уравнение"}),
        ("building and programming", {"building", "programming"}),
        ("snake_case_name", {"snake", "case"}),
    ],
)  # fmt: skip
def test_nouns_of_any_script_stay(text, wanted):
    """Hindi words were cut at every vowel sign."""
    assert wanted <= set(phrases(text))


def test_an_adjective_ends_no_phrase_and_starts_some():
    found = phrases("The linear algebra is important")
    assert "linear algebra" in found and not any(phrase.endswith(("linear", "important")) for phrase in found)


def test_scripts_without_spaces_give_words(tmp_path):
    """Chinese and Japanese sentences were one word each, which no two records shared."""
    chinese = [
        "请解释量子力学的基本原理。", "量子力学和相对论有什么区别？", "量子力学是什么？",
        "如何做面包？面包需要酵母。", "酵母面包的做法。", "什么是相对论？",
        "小说的主角", "这部小说", "股票市场", "市场的股票",
    ]  # fmt: skip
    found = tags(tmp_path, chinese, spread=2)
    assert all(isinstance(answer, Answer) for answer in found)
    assert "量子力学" in found[0].tags and "量子力学" in found[2].tags
    assert not {"量子", "子力", "力学", "子力学"} & set(found[2].tags)  # parts of a word
    assert {"面包", "酵母"} <= set(found[3].tags) and "相对论" in found[5].tags
    assert list(segments("データベースを使う", "characters")) == ["データベース"]
    assert "ภาษาไทย" not in flat("x") and list(segments("ไทย", "characters")) != []


def test_an_n_gram_is_dropped_only_where_a_longer_one_has_its_records():
    names = np.array(["量子", "量子力学", "力学", "abc"])
    assert contained_grams(names, np.array([10, 10, 30, 5])).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("segmenter", "text", "wanted"),
    [("jieba", "请解释量子力学的基本原理", "量子力学"), ("fugashi", "機械学習の基礎を説明してください", "基礎")],
)
def test_a_library_segments_where_it_is_named(segmenter, text, wanted):
    pytest.importorskip(segmenter, reason=f"pip install {segmenter} to test its words")
    assert wanted in phrases(text, segmenter)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)
    segment._library.cache_clear()
    with pytest.raises(UsageError, match="pip install fugashi unidic-lite"):
        KeyphraseTagger(6, Engine("local", 1), segmenter="fugashi")


def test_a_template_s_phrases_are_no_tags(tmp_path):
    """Every fifth record's words and more are what records have in common, not what tells them apart."""
    topics = ["bread oven", "chess rook", "harbour anchor", "genome protein", "violin sonata", "volcano lava"]
    texts = [f"Reference Manual. Part {number}: {topics[number % 6]}." for number in range(1200)]
    found = tags(tmp_path, texts)
    assert {tag for answer in found for tag in answer.tags} == set(topics)
