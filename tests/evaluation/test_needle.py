"""Needle cases: what each form hides and asks for, in both languages."""

import numpy as np
import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.needle import FORMS, Score, build_case, decoded, plot_heat_map
from megatron_ksa.evaluation.text_language import TextLanguage
from megatron_ksa.evaluation.token_language import KEY, VOCABULARY, TokenLanguage

ESSAY = " ".join(f"The {chr(97 + i % 26) * 3}{chr(97 + i // 26) * 2} river ran on." for i in range(300))


def languages():
    text = TextLanguage(lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), ESSAY)
    return {"tokens": TokenLanguage(), "text": text}


@pytest.mark.parametrize("name", ["tokens", "text"])
@pytest.mark.parametrize("form", FORMS)
def test_every_answer_stands_in_its_haystack(form, name):
    language, length = languages()[name], 4000
    case = build_case(FORMS[form], language, length, 0.5, np.random.default_rng(0))
    answers = [token for piece in case.answer for token in piece]
    total = len(case.prompt) + len(answers)
    assert length - 200 <= total <= length
    assert len(case.answer) == FORMS[form].asked * FORMS[form].values_per_key
    text = " ".join(map(str, case.prompt))
    for piece in case.answer:
        value = piece[:-1] if name == "tokens" else list(bytes(piece).decode().replace("and ", "").strip(", ").encode())
        assert " ".join(map(str, value)) in text
    again = build_case(FORMS[form], language, length, 0.5, np.random.default_rng(0))
    assert again == case


@pytest.mark.parametrize("name", ["tokens", "text"])
@pytest.mark.parametrize("form", ["single_2", "multiquery"])
def test_a_decoder_is_scored_by_what_it_wrote(form, name):
    """The reference is exact; its values in another order are all there but not exact; half of them are half."""
    language = languages()[name]
    case = build_case(FORMS[form], language, 4000, 0.5, np.random.default_rng(0), decoded=True)
    assert case.new_tokens == (128 if name == "text" else sum(map(len, case.answer)))
    assert 3800 <= len(case.prompt) + case.new_tokens <= 4000

    def score(pieces):
        return decoded(lambda prompts, new: [[t for piece in pieces for t in piece]], language, [case])[0]

    assert score(case.answer) == (True, 1.0)
    backwards = score([*case.answer[::-1]])
    assert backwards == ((False, 1.0) if form == "multiquery" else (True, 1.0))
    assert score([]) == (False, 0.0)
    if form == "multiquery":
        assert score(case.answer[:2]) == (False, 0.5)


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0, 0), (0.5, 900, 1100), (1.0, 1900, 2000)])
def test_the_needle_stands_at_its_depth(depth, low, high):
    case = build_case(FORMS["single_2"], TokenLanguage(), 2000, depth, np.random.default_rng(1))
    assert low <= case.prompt.index(KEY) <= high


def test_too_short_a_length_names_the_least():
    with pytest.raises(UsageError, match="10 tokens are too few"):
        build_case(FORMS["multiquery"], TokenLanguage(), 10, 0.5, np.random.default_rng(0))


def test_training_documents_have_the_length_asked_for():
    document = TokenLanguage().document(1000, np.random.default_rng(0))
    assert 900 <= len(document) <= 1000 and document[-1] == 0 and document.max() < VOCABULARY


def test_heat_map(tmp_path):
    scores = [Score("single_1", 1024, depth, 1, 1.0, depth) for depth in (0.0, 1.0)]
    plot_heat_map(scores, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
