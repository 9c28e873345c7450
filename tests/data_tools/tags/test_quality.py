"""Quality by rule: each sign on texts that have it, and on likely ones that do not."""

import pytest

from megatron_ksa.data_tools.tags.taggers.quality import rule_quality, signs

QUESTION = "Describe how a tide table is read, and name two harbours where the moon matters more than the wind."
ANSWER = "A tide table lists the times of high and low water for each day. Subtract the chart datum to get the depth."


def chat(answer: str | None, question: str = QUESTION) -> dict:
    turns = [{"role": "user", "content": question}]
    return {"messages": turns if answer is None else [*turns, {"role": "assistant", "content": answer}]}


WORDS = "tide moon harbour chart depth anchor wind rope hull keel sail port bell fog pilot quay".split()
LONG = " ".join(
    f"{WORDS[i % 16].title()} and {WORDS[(5 * i + 3) % 16]} {WORDS[(7 * i + i // 16) % 16]}." for i in range(40)
)
CASES = {
    "no answer": [None, "", "  \n", "N/A", "<noinput>", "TODO"],
    "refusal": [
        "I'm sorry, but I can't help with that.", "As an AI language model, I have no harbours.",
        "I cannot provide instructions for this.", "很抱歉，我无法回答这个问题。",
    ],
    "repeated words": [
        "tide " * 20, ("the moon pulls the water " * 40), "high water low water " * 60,
    ],
    "repeated lines": ["The tide comes in.\nThe tide goes out.\n" * 10],
    "repeats the question": [QUESTION, QUESTION + " Yes."],
    "cut off": [ANSWER * 3 + " The moon pulls the wat", "```python\nprint(1)\n"],
}  # fmt: skip


@pytest.mark.parametrize(("sign", "answer"), [(sign, answer) for sign, answers in CASES.items() for answer in answers])
def test_each_sign_is_noticed_and_costs(sign, answer):
    found = chat(answer)
    assert sign in set(signs(found))
    assert rule_quality(found) < rule_quality(chat(ANSWER)) == 7


@pytest.mark.parametrize(
    "answer",
    [
        "42", "No", "None", "([{}])", "0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0", "B", "Yes, as an aid.", "return x",
        "I can't find a shorter proof, so here is the long one: assume the opposite.",
        ANSWER * 3 + " See https://example.com/tides", "- high water\n- low water\n" + ANSWER * 3 + "\n- the moon",
        "是的。", "```python\nfor i in range(3):\n    print(i)\n```",
    ],
)  # fmt: skip
def test_short_true_answers_lose_nothing(answer):
    assert rule_quality(chat(answer)) >= 7


def test_length_and_parts_count_and_text_is_its_own_answer():
    assert rule_quality(chat(LONG)) == 8
    assert rule_quality(chat(LONG.replace(". ", ".\n\n"))) == 9
    assert rule_quality({"text": LONG}) == 8 and rule_quality({"text": "tide " * 50}) == 3
    assert rule_quality({"messages": []}) == 1
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tides", "arguments": {}}}]}
    assert rule_quality({"messages": [{"role": "user", "content": "tides?"}, call]}) == 7
