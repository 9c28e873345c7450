"""Quality of an instance without a model: a stated rule about its answer's length, repetition, refusal and absence.

`data_tools/tags/README.md` has the rule. The score says that nothing is plainly wrong, not that an answer is right. The
limits on repeated lines and n-grams are those of MassiveText (Rae et al. 2021, arXiv 2112.11446, table A1).
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import regex

from megatron_ksa.data_tools.tags.records import message_text

BASE = 7.0
_PLACEHOLDER = regex.compile(
    r"\s*|\W*(?:n/a|todo|tbd|no (?:input|output|answer|response)|deleted|removed|blank|noinput|nooutput)\W*",
    regex.IGNORECASE,
)
_REFUSAL = regex.compile(
    r"\b(?:i(?:'m| am) (?:sorry|afraid)[^.!?\n]{0,40}\b(?:can(?:not|'t)|unable|not able|won't)"
    r"|i (?:can(?:not|'t)|won't|am unable to|'m unable to|am not able to|'m not able to)"
    r" (?:help|assist|provide|comply|fulfil|fulfill|answer|create|generate|complete|do that|access|browse|see images)"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:it|this) (?:is|would be) (?:inappropriate|unethical|against my)"
    r"|(?:抱歉|对不起|很抱歉)[^。！？]{0,12}(?:无法|不能)|作为(?:一个)?(?:ai|人工智能)|申し訳[^。]{0,20}(?:できません|お答え))",
    regex.IGNORECASE,
)
REFUSAL_START = 200
REPEATED_LINES, REPEATED_LINE_CHARACTERS = 0.30, 0.20
TOP_GRAM = {2: 0.20, 3: 0.18, 4: 0.16}
LONG, STRUCTURED = 100, 60
_SENTENCE = regex.compile(r"\p{L}[.!?]\s|[。！？]")
# Gaps between these are as good as words, for scripts without spaces.
_WORDS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\p{L}\p{M}\p{N}']+")
_LIST = regex.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", regex.MULTILINE)
CHARACTERS = 20_000


def question_and_answer(record: dict) -> tuple[str, str | None]:
    """The last turn before the last assistant turn and that turn's text; of a plain text nothing and the text.

    The answer is None where the conversation has none at its end. A call of a tool is an answer.
    """
    if "text" in record:
        return "", record["text"]
    messages = record["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        return message_text(messages[-1]) if messages else "", None
    asked = next((message_text(each) for each in messages[-2::-1] if each["role"] == "user"), "")
    return asked, message_text(messages[-1])


def signs(record: dict) -> Iterator[str]:
    """Names of what the rule notices in a record."""
    question, answer = question_and_answer(record)
    if answer is None or _PLACEHOLDER.fullmatch(answer[:100].strip()):
        yield "no answer"
        return
    answer = answer[:CHARACTERS].replace("’", "'").strip()
    if _REFUSAL.search(answer[:REFUSAL_START]):
        yield "refusal"
    # Grids of numbers repeat themselves.
    words = [word for word in _WORDS.findall(answer.lower()) if not word.isdigit()]
    if _repeats_lines(answer):
        yield "repeated lines"
    if _repeats_words(words):
        yield "repeated words"
    if _echoes(question, answer):
        yield "repeats the question"
    last = answer.rsplit("\n", 1)[-1]
    # Items of lists and addresses end without a full stop.
    complete = _LIST.match(last) or any(c in last.rsplit(" ", 1)[-1] for c in "/.@:")
    ends_open = (answer[-1].isalpha() or answer[-1] in ",;") and not complete
    if answer.count("```") % 2 or (len(answer) >= 200 and ends_open and _SENTENCE.search(answer)):
        yield "cut off"
    if len(words) >= LONG:
        yield "long"
    parts = max(answer.count("\n\n") + 1, len(_LIST.findall(answer)), 3 * (answer.count("```") >= 2))
    if len(words) >= STRUCTURED and parts >= 3:
        yield "parts"


def _repeats_lines(answer: str) -> bool:
    lines = [line for line in map(str.strip, answer.split("\n")) if sum(map(str.isalpha, line)) > 3]
    if len(lines) < 4:
        return False
    counts = Counter(lines)
    again = [line for line, count in counts.items() for _ in range(count - 1)]
    characters = sum(map(len, again)) / max(1, sum(map(len, lines)))
    return len(again) / len(lines) > REPEATED_LINES or characters > REPEATED_LINE_CHARACTERS


def _repeats_words(words: list[str]) -> bool:
    if len(words) < LONG:
        # The limits are those of documents; in a short answer a word again and again.
        return len(words) >= 8 and sum(a == b and len(a) > 1 for a, b in pairwise(words)) > len(words) / 2
    whole = sum(map(len, words))
    for length, most in TOP_GRAM.items():
        grams = Counter(zip(*(words[start:] for start in range(length)), strict=False))
        gram, count = grams.most_common(1)[0]
        if count > 2 and count * sum(map(len, gram)) / whole > most:
            return True
    return False


def _echoes(question: str, answer: str) -> bool:
    asked, said = _WORDS.findall(question.lower()), _WORDS.findall(answer.lower())
    if len(asked) >= 5 and asked == said:
        return True
    same = sum(a == b for a, b in zip(asked, said, strict=False))
    return len(asked) >= 12 and same >= 0.8 * len(asked)


def rule_quality(record: dict) -> float:
    """The score, 1 to 10."""
    found = set(signs(record))
    if "no answer" in found:
        return 1.0
    if "refusal" in found:
        return 2.0
    score = BASE - 2 * ("cut off" in found) + ("long" in found) + ("parts" in found)
    bad = found & {"repeated lines", "repeated words", "repeats the question"}
    return max(1.0, min(score, 3.0) if bad else score)
