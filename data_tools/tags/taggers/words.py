"""Words of a text that can be part of a tag, in runs without anything between them that ends a phrase.

A tag is a noun phrase. Left out, and ending a phrase: stop words and what contractions are made of (`who's`, `i'm`),
greetings, verbs, adverbs, numbers, addresses and their parts (`www`, `com`, `png`), markup and its commands. Adjectives
may stand in a phrase, not at its end. Verbs, adverbs and adjectives are known in English only (`english.json`, drawn
from WordNet by `examples/tags/word_classes.py`).

Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words. Their runs are cut by `segment.py`.
"""

import html
import json
from functools import cache
from importlib.resources import files

import regex
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

GREETINGS = frozenset(
    "hello hi hey dear greetings welcome goodbye bye thanks thank thx please pls sorry congrats congratulations "
    "regards sincerely cheers yes yeah yep no nope ok okay sure oh ah hmm well wow lol haha etc eg ie vs".split()
)
# What chats about any topic are full of.
TALK = frozenset(
    "question questions answer answers example examples following thing things way ways lot lots kind kinds sort bit "
    "something anything everything nothing someone anyone everyone let lets let's wanna gonna gotta dont didnt doesnt "
    "isnt wasnt cant couldnt wouldnt wont im ive id youre youve theyre thats whats heres theres".split()
)
ADDRESS_PARTS = frozenset(
    "http https ftp www com org net edu gov io html htm php asp aspx jsp xml css png jpg jpeg gif svg webp bmp ico pdf "
    "mp3 mp4 avi mov zip tar gz exe dll href src alt img br hr div span nbsp amp quot lt gt utf url urls uri".split()
)
_CONTRACTION = regex.compile(r"(?:n't|'(?:s|m|re|ve|ll|d|t))$")
# French and Italian articles and pronouns before a vowel.
_ELISION = regex.compile(r"^(?:[cdjlmnst]|qu|jusqu|lorsqu|dell|all|nell|sull|un)'(?=\p{L}{2})")
_ADDRESS = regex.compile(
    r"\b(?:https?|ftp|file|mailto)\s?:\S+|\bwww\.\S+|\S+@\S+\.\w+"
    r"|\b(?:[\w-]+\.)+(?:com|org|net|edu|gov|io|co|dev|ai|info|biz|de|uk|fr|cn|jp|ru)\b(?:/\S*)?"
    r"|[\w/.-]*\w\.(?:html?|php|aspx?|png|jpe?g|gif|svg|webp|bmp|ico|pdf|mp[34]|avi|mov|zip|tar|gz|exe|dll)\b"
)
_MARKUP = regex.compile(r"<[/!]?[a-z][^<>]{0,300}>|<\|[^<>|]{1,60}\|>|\\[a-z]+\*?|\[/?[a-z]{1,12}\]", regex.IGNORECASE)
_WORD = regex.compile(r"[\p{L}\p{N}](?:[\p{L}\p{M}\p{N}'+#\-]*[\p{L}\p{M}\p{N}+#])?\p{M}*")
_BREAK = regex.compile(r"[^\p{L}\p{M}\p{N}'+#\-\s]|\n")


def inflected(verb: str) -> set[str]:
    """Regular forms of an English verb, some of them not in use."""
    stem = verb[:-1] if verb.endswith("e") else verb
    forms = {verb + "s", stem + "ed", stem + "ing", verb + "es"}
    if verb.endswith("y"):
        forms |= {verb[:-1] + "ies", verb[:-1] + "ied"}
    if len(verb) > 2 and verb[-1] not in "aeiouwxy" and verb[-2] in "aeiou" and verb[-3] not in "aeiou":
        forms |= {verb + verb[-1] + "ed", verb + verb[-1] + "ing"}
    return forms


@cache
def _english() -> tuple[frozenset[str], frozenset[str]]:
    """Words that end a phrase, and adjectives."""
    path = files("megatron_ksa.data_tools.tags.taggers") / "english.json"
    words = {kind: text.split() for kind, text in json.loads(path.read_text(encoding="utf-8")).items()}
    forms = {form for verb in words["verb"] for form in inflected(verb) if not form.endswith("ing")}
    verbs = forms - set(words["nouns_like_verb_forms"])
    ends = verbs.union(words["verb"], words["adverb"], words["irregular_verb_forms"], words["gerunds"])
    return frozenset(ends) | ENGLISH_STOP_WORDS | GREETINGS | TALK | ADDRESS_PARTS, frozenset(words["adjective"])


def plain(text: str) -> str:
    """The text in lower case, with breaks in place of addresses and markup, and one kind of apostrophe."""
    text = html.unescape(text).replace("’", "'").replace("ʼ", "'")
    return _MARKUP.sub("\n", _ADDRESS.sub("\n", text)).lower()


def runs(text: str) -> list[list[str]]:
    """Runs of words that may be part of a tag, in lower case."""
    ends = _english()[0]
    found: list[list[str]] = []
    for part in _BREAK.split(plain(text)):
        run: list[str] = []
        for match in _WORD.finditer(part):
            word = _ELISION.sub("", match[0])
            bare = _CONTRACTION.sub("", word)
            shortened = bare != word and not word.endswith("'s")
            if len(bare) < 2 or shortened or word in ends or bare in ends or not any(c.isalpha() for c in bare):
                run = []
                continue
            if not run:
                found.append(run)
            run.append(bare)
            if bare != word:
                run = []  # a genitive ends a phrase
    return found


def is_adjective(word: str) -> bool:
    """Whether an English word is an adjective rather than a noun."""
    return word in _english()[1]
