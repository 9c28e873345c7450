"""Words of scripts that put no spaces between them: by a library, or runs of characters by a rule.

The rule, for text without a dictionary: a run of Han is cut at function characters, and each piece gives its n-grams of
2 to 4 characters; katakana makes words as it stands, hiragana ends them (Japanese writes endings and particles in it);
of Thai, Lao, Khmer and Burmese n-grams of 3 to 8 characters that start at a consonant or vowel. Which n-grams are words
the pool tells: `keyphrase.py` takes those that several records share, and drops one that hardly occurs outside a longer
one.
"""

from collections.abc import Iterator
from functools import cache

import regex

from megatron_ksa.errors import UsageError

SEGMENTERS = ("characters", "jieba", "fugashi")
UNSPACED = regex.compile(r"[\p{Han}\p{Katakana}\p{Hiragana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_PIECES = regex.compile(
    r"(?P<han>\p{Han}+)|(?P<kana>[\p{Katakana}ー]+)|(?P<kept>[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+)"
)
# Characters that are words of grammar more than parts of nouns.
_FUNCTION = regex.compile(r"[的了是在我你他她它们們这這那哪个個不吗嗎呢吧啊么麼请請什怎也就都而及或被把让讓与與很]")
HAN, KEPT = (2, 3, 4), (3, 4, 5, 6, 7, 8)
_NOUN = {"名詞"}


def _grams(text: str, lengths: tuple[int, ...]) -> Iterator[str]:
    clusters = regex.findall(r"\X", text)
    for start in range(len(clusters)):
        for length in lengths:
            if start + length <= len(clusters):
                yield "".join(clusters[start : start + length])


@cache
def _library(name: str):
    """A library's function from a text to its words, with a check that it is there.

    Raises:
        UsageError: it is not installed.
    """
    try:
        if name == "jieba":
            import jieba.posseg

            jieba.setLogLevel(60)
            # Nouns, verbs used as nouns, idioms and abbreviations.
            return lambda text: [
                pair.word for pair in jieba.posseg.cut(text) if pair.flag[:1] in "nlij" or pair.flag == "vn"
            ]
        import fugashi

        tagger = fugashi.Tagger()
        return lambda text: [word.surface for word in tagger(text) if word.feature.pos1 in _NOUN]
    except (ModuleNotFoundError, RuntimeError) as error:
        packages = {"jieba": "jieba", "fugashi": "fugashi unidic-lite"}[name]
        raise UsageError(f"--segmenter {name}: {' '.join(str(error).split())[:120]}; pip install {packages}") from None


def check_segmenter(name: str) -> None:
    """Raise a UsageError if a library is not installed."""
    if name != SEGMENTERS[0]:
        _library(name)


def segments(text: str, segmenter: str) -> Iterator[str]:
    """Candidates for words in a run of `UNSPACED`, of 2 or more characters."""
    if segmenter != SEGMENTERS[0]:
        yield from (word for word in _library(segmenter)(text) if len(word) > 1)
        return
    for match in _PIECES.finditer(text):
        if match["kana"]:
            if len(match["kana"]) > 1:
                yield match["kana"]
        elif match["kept"]:
            yield from _grams(match["kept"], KEPT)
        else:
            for piece in _FUNCTION.split(match["han"]):
                yield from _grams(piece, HAN)
