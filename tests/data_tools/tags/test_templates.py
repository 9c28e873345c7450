"""Token for token what `apply_chat_template` gives, with the responses alone in the loss, for the usual kinds."""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_templates import KINDS
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ksa.data_tools.tags.chat_template import DocumentEncoder, EncodingSettings, encode_document
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.formats import input_files
from megatron_ksa.data_tools.tags.read import RECORDS, read
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.data_tools.tokenizers import ChatTemplateError, load_tokenizer, write_byte_level
from megatron_ksa.errors import UsageError

CASES = Path(__file__).with_name("cases")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": " One? \n"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two, and über <b>?"}, {"role": "assistant", "content": "2\n"},
]  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "tides", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "ferry", "parameters": {"type": "object"}}},
]
CALL = {"type": "function", "function": {"name": "tides", "arguments": '{"port": "Brest", "day": 3}'}}
WITH_CALL = [
    TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"high": "00:40"}'}, {"role": "assistant", "content": "At 00:40."}, *TURNS[2:],
]  # fmt: skip
THOUGHTS = [
    TURNS[0], {**TURNS[1], "reasoning_content": "count"}, TURNS[2], {**TURNS[3], "reasoning_content": "count on"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The function that gives a byte-level tokenizer with a template and its control tokens."""
    plain = tmp_path_factory.mktemp("tokenizer")
    write_byte_level(plain)

    def with_template(template: str, control: list[str]):
        fast = AutoTokenizer.from_pretrained(plain, split_special_tokens=False)
        fast.add_special_tokens({"additional_special_tokens": control})
        fast.bos_token = "<s>" if "<s>" in control else None
        fast.chat_template = template
        folder = tmp_path_factory.mktemp("templated")
        fast.save_pretrained(folder)
        return load_tokenizer(str(folder))

    return with_template


def counted(loaded, ids, mask) -> list[str]:
    """Text of each run of tokens in the loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [loaded.fast.decode(ids[first:end]) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def library_ids(loaded, messages, tools=None) -> list[int]:
    return loaded.fast.apply_chat_template(messages, tools=tools, return_dict=False)


def without_end(loaded, ids) -> list[int]:
    """The ids but for the end of the document, where the text does not end with it."""
    assert ids[-1] == loaded.end_of_document
    return ids[:-1].tolist()


@pytest.mark.parametrize(
    ("kind", "chat", "responses"),
    [
        ("chatml", [SYSTEM, *TURNS], ["1<|im_end|>\n", "2\n<|im_end|>\n<|endoftext|>"]),
        ("llama 2", [SYSTEM, *TURNS], ["1 <|endoftext|>", "2 <|endoftext|>"]),
        ("llama 3", [SYSTEM, *TURNS], ["1<|eot_id|>", "2<|eot_id|><|endoftext|>"]),
        ("qwen 3", [SYSTEM, *TURNS], ["1<|im_end|>\n", "<think>\n\n</think>\n\n2\n<|im_end|>\n<|endoftext|>"]),
        ("mistral", TURNS, ["1<|endoftext|>", "2\n<|endoftext|>"]),
        ("gemma", [SYSTEM, *TURNS], ["1<end_of_turn>\n", "2<end_of_turn>\n<|endoftext|>"]),
        ("deepseek", [SYSTEM, *TURNS], ["1<｜end▁of▁sentence｜>", "2\n<｜end▁of▁sentence｜><|endoftext|>"]),
        ("phi", [SYSTEM, *TURNS], ["1<|end|>\n", "2\n<|end|>\n<|endoftext|>"]),
        ("marked", [SYSTEM, *TURNS], ["1", "2\n", "<|endoftext|>"]),
    ],
)  # fmt: skip
def test_several_turns_with_a_system_text(tokenizer, kind, chat, responses):
    loaded = tokenizer(*KINDS[kind])
    encoder = DocumentEncoder(loaded, "tokenizer")
    for _ in range(2):  # the second time by the seams of the first
        ids, mask = encoder.encode({"messages": chat})
        expected = library_ids(loaded, chat)
        assert (ids if ids.tolist() == expected else ids[:-1]).tolist() == expected and ids.tolist().count(256) >= 1
        assert counted(loaded, ids, mask) == responses
    other = [{**message, "content": message["content"] + " more"} for message in chat]
    ids, mask = encoder.encode({"messages": other})
    fresh = DocumentEncoder(loaded, "tokenizer").encode({"messages": other})
    np.testing.assert_array_equal(ids, fresh[0])
    np.testing.assert_array_equal(mask, fresh[1])


@pytest.mark.parametrize(
    ("kind", "parse", "call", "answer"),
    [
        (
            "llama 3", True, '{"name": "tides", "parameters": {"port": "Brest", "day": 3}}<|eot_id|>',
            "At 00:40.<|eot_id|>",
        ),
        (
            "qwen 3", True,
            '<tool_call>\n{"name": "tides", "arguments": {"port": "Brest", "day": 3}}\n</tool_call><|im_end|>\n',
            "At 00:40.<|im_end|>\n",
        ),
        (
            "mistral", True, '[TOOL_CALLS] [{"name": "tides", "arguments": {"port": "Brest", "day": 3}}]<|endoftext|>',
            "At 00:40.<|endoftext|>",
        ),
    ],
)  # fmt: skip
def test_tools_calls_and_results(tokenizer, kind, parse, call, answer):
    """Calls and tools once vanished; arguments are given as text and templates write objects."""
    loaded = tokenizer(*KINDS[kind])
    ids, mask = DocumentEncoder(loaded, "tokenizer").encode({"messages": WITH_CALL, "tools": TOOLS})
    with_objects = json.loads(json.dumps(WITH_CALL))
    with_objects[1]["tool_calls"][0]["function"]["arguments"] = json.loads(CALL["function"]["arguments"])
    del with_objects[1]["content"]
    expected = library_ids(loaded, with_objects, TOOLS)
    assert (ids if ids.tolist() == expected else ids[:-1]).tolist() == expected
    assert counted(loaded, ids, mask)[:2] == [call, answer] and "ferry" in loaded.fast.decode(ids)


def test_arguments_that_a_template_takes_as_text(tokenizer):
    loaded = tokenizer(*KINDS["deepseek"])
    ids, mask = DocumentEncoder(loaded, "tokenizer").encode({"messages": WITH_CALL})
    assert without_end(loaded, ids) == library_ids(loaded, WITH_CALL)
    assert counted(loaded, ids, mask)[0] == (
        '<｜tool▁call▁begin｜>tides\n{"port": "Brest", "day": 3}<｜tool▁call▁end｜><｜end▁of▁sentence｜>'
    )


def test_thoughts(tokenizer):
    """Earlier thoughts were once kept and trained on, with an empty think block before the real one."""
    inside = [
        TURNS[0], {"role": "assistant", "content": "<think>\ncount\n</think>\n\n1"}, TURNS[2],
        {"role": "assistant", "content": "<think>\ncount on\n</think>\n\n2\n"},
    ]  # fmt: skip
    expected = ["1<|im_end|>\n", "<think>\ncount on\n</think>\n\n2\n<|im_end|>\n<|endoftext|>"]
    for chat in (THOUGHTS, inside):
        loaded = tokenizer(*KINDS["qwen 3"])
        ids, mask = DocumentEncoder(loaded, "tokenizer").encode({"messages": chat})
        assert without_end(loaded, ids) == library_ids(loaded, chat)
        assert counted(loaded, ids, mask) == expected
    loaded = tokenizer(*KINDS["deepseek"])
    ids, mask = DocumentEncoder(loaded, "tokenizer").encode({"messages": inside})
    assert without_end(loaded, ids) == library_ids(loaded, inside)
    assert counted(loaded, ids, mask)[0] == "1<｜end▁of▁sentence｜>"


def test_thinking_case(tmp_path, tokenizer):
    """The case's template: thoughts of the last response alone, blanks trimmed."""
    template = (CASES / "templates" / "thinking.jinja").read_text(encoding="utf-8")
    loaded = tokenizer(template, ["<|im_start|>", "<|im_end|>"])
    read(input_files([str(CASES / "thinking.jsonl")]), tmp_path, RecordSettings(), Engine())
    (record,) = read_jsonl(tmp_path / RECORDS)
    raw = json.loads((CASES / "thinking.jsonl").read_text(encoding="utf-8"))
    ids, mask = DocumentEncoder(loaded, "tokenizer").encode(record)
    assert without_end(loaded, ids) == library_ids(loaded, raw["messages"])
    assert "again" in loaded.fast.decode(ids) and "add them" not in loaded.fast.decode(ids)
    first, last = counted(loaded, ids, mask)
    assert first == "4<|im_end|>\n" and last == "again\n</think>\n\n6<|im_end|>\n<|endoftext|>"


def test_tool_calls_case(tmp_path, tokenizer):
    loaded = tokenizer(*KINDS["qwen 3"])
    read(input_files([str(CASES / "tool_calls.jsonl")]), tmp_path, RecordSettings(), Engine())
    raw = [json.loads(line) for line in (CASES / "tool_calls.jsonl").read_text(encoding="utf-8").splitlines()]
    for record, given in zip(read_jsonl(tmp_path / RECORDS), raw, strict=True):
        for message in given["messages"]:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        ids, mask = DocumentEncoder(loaded, "tokenizer").encode(record)
        assert without_end(loaded, ids) == library_ids(loaded, given["messages"], given["tools"])
        assert "<tool_call>" in counted(loaded, ids, mask)[0]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("chatml", {"messages": WITH_CALL[:4]}, "leaves out a tool call"),
        ("chatml", {"messages": TURNS, "tools": TOOLS}, "leaves out the tools"),
        ("chatml", {"messages": THOUGHTS}, "leaves out reasoning_content"),
        ("llama 3", {"messages": [TURNS[0], {**WITH_CALL[1], "tool_calls": [CALL, CALL]}]}, "one call a turn"),
        ("mistral", {"messages": [SYSTEM, *TURNS]}, "no role system"),
        ("llama 2", {"messages": [TURNS[0], *TURNS]}, "turns must alternate"),
        ("phi", {"messages": WITH_CALL, "tools": TOOLS}, "leaves out"),
        ("deepseek", {"messages": WITH_CALL, "tools": TOOLS}, "leaves out the tools"),
    ],
)
def test_what_a_template_leaves_out_refuses_the_record(tokenizer, kind, record, message):
    """The reason of the last two was once "'dict object' has no attribute 'content'" and of an addition in Python."""
    with pytest.raises(ChatTemplateError, match=message):
        DocumentEncoder(tokenizer(*KINDS[kind]), "tokenizer").encode(record)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role + m.content[:3] }}{% endfor %}", "changes contents|once and in order"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "writes a message twice"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "once and in order"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "the template changes a content"),
        (
            "{% for m in messages %}{{ m.content }}"
            "{{ m.tool_calls | default([]) | map(attribute='function') | join }}{% endfor %}",
            "as Python, not as JSON",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(tokenizer, template, message):
    chat = [TURNS[0], {"role": "assistant", "content": "<|im_end|> on", "tool_calls": [CALL] * ("tool" in template)}]
    with pytest.raises(ChatTemplateError, match=message):
        DocumentEncoder(tokenizer(template, ["<|im_end|>"]), "tokenizer").encode({"messages": chat})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_content_that_names_control_tokens_is_text(tokenizer, kind):
    """The whole text is encoded at once, and still no content becomes markup."""
    loaded = tokenizer(*KINDS[kind])
    control = {loaded.fast.convert_tokens_to_ids(name) for name in KINDS[kind][1]}
    told = "".join(KINDS[kind][1])
    chats = [[{**m, "content": m["content"] + end} for m in TURNS] for end in (" plain", f" {told} x")]
    encoder = DocumentEncoder(loaded, "tokenizer")
    (ids, mask), (named, named_mask) = (encoder.encode({"messages": chat}) for chat in chats)
    assert [i for i in ids if i in control] == [i for i in named if i in control]
    assert loaded.fast.decode(named).count(told) == 4
    assert loaded.fast.decode(named[named_mask == 1]).count(told) == 2


def metaspace(folder: Path) -> None:
    """A tokenizer of Llama 2's kind: a space before the text, and spaces as part of words."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzBOT?.1234567890\n", "▁Be", "▁One", "One", "▁1", "brief"]
    vocabulary = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "</s>": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(words)}
    merges = [("▁", "B"), ("▁B", "e"), ("▁", "O"), ("▁O", "n"), ("▁On", "e"), ("O", "n"), ("On", "e"), ("▁", "1")]
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.save_pretrained(folder)


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_no_lone_space_at_a_seam(tmp_path, template):
    """A tokenizer that puts a space before each text once put one at every seam of two parts, in the loss too."""
    metaspace(tmp_path / "metaspace")
    sample = ["Be brief. One? 1 Two? 2"] * 20
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample), model_prefix=str(tmp_path / "bpe"), vocab_size=290, byte_fallback=True,
        model_type="bpe", user_defined_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
    )  # fmt: skip
    chat = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Be"},
    ]  # fmt: skip
    text = "One?\n\n1\n\nBe" if template == "plain" else "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat
    )  # fmt: skip
    for model in ("metaspace", "bpe.model"):
        loaded = load_tokenizer(str(tmp_path / model))
        ids, mask = DocumentEncoder(loaded, template).encode({"messages": chat})
        assert without_end(loaded, ids) == loaded.encode(text)
        decode = loaded.fast.decode if model == "metaspace" else loaded._model.decode
        answer = decode(ids[mask == 1].tolist())
        assert answer.strip() == ("1" if template == "plain" else "1<|im_end|>")


def test_markers_of_sentencepiece_in_a_content(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Be brief. One? 1 Two? 2"] * 20), model_prefix=str(tmp_path / "bpe"), vocab_size=290,
        byte_fallback=True, model_type="bpe", user_defined_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
    )  # fmt: skip
    loaded = load_tokenizer(str(tmp_path / "bpe.model"))
    chat = [{"role": "user", "content": "x<|im_end|> ü"}, {"role": "assistant", "content": "One 中"}]
    ids, mask = DocumentEncoder(loaded, "chatml").encode({"messages": chat})
    marker = loaded._model.piece_to_id("<|im_end|>")
    assert ids.tolist().count(marker) == 2
    assert loaded._model.decode(ids[mask == 1].tolist()).strip() == "One 中<|im_end|>"
    assert "x<|im_end|> ü" in loaded._model.decode(ids.tolist())


def test_weight_zero_is_outside_the_loss(tokenizer):
    loaded = tokenizer(*KINDS["chatml"])
    chat = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    for template in ("plain", "chatml", "tokenizer"):
        ids, mask = DocumentEncoder(loaded, template).encode({"messages": chat})
        (only,) = counted(loaded, ids, mask)
        assert only.startswith("2")


def encoded(loaded, record: dict, **settings):
    settings = EncodingSettings("unused", **{"template": "chatml", "loss_on": "responses", **settings})
    return encode_document(DocumentEncoder(loaded, settings.template), record, settings)


def test_no_response_case(tmp_path, tokenizer):
    """With the loss on responses a record without one trained on nothing, and a last question was kept."""
    loaded = tokenizer(*KINDS["chatml"])
    read(input_files([str(CASES / "no_response.jsonl")]), tmp_path, RecordSettings(), Engine())
    none, cut, whole = read_jsonl(tmp_path / RECORDS)
    with pytest.raises(ChatTemplateError, match="no response"):
        encoded(loaded, none)
    found = encoded(loaded, cut)
    assert found.cut == 1 and "Another?" not in loaded.fast.decode(found.ids) and found.mask[-1] == 1
    assert encoded(loaded, whole).cut == 0
    assert "Another?" in loaded.fast.decode(encoded(loaded, cut, loss_on="all").ids)
    assert encoded(loaded, none, loss_on="all").mask.all()
    with pytest.raises(ChatTemplateError, match="no response"):
        encoded(loaded, {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]})


def test_length_is_kept_by_leaving_out_whole_turns(tokenizer):
    loaded = tokenizer(*KINDS["chatml"])
    whole = encoded(loaded, {"messages": TURNS})
    first = encoded(loaded, {"messages": TURNS[:2]})
    at = {limit: encoded(loaded, {"messages": TURNS}, max_length=limit) for limit in (len(whole.ids), len(first.ids))}
    assert at[len(whole.ids)].truncated == 0 and at[len(first.ids)].truncated == 2
    np.testing.assert_array_equal(at[len(first.ids)].ids, first.ids)
    with pytest.raises(ChatTemplateError, match=f"a first exchange longer than {len(first.ids) - 1} tokens"):
        encoded(loaded, {"messages": TURNS}, max_length=len(first.ids) - 1)
    with pytest.raises(ChatTemplateError, match="a text longer than 5 tokens"):
        encoded(loaded, {"text": "tides"}, max_length=5)
    with pytest.raises(UsageError, match="--max-length 9: at most --pack 8"):
        EncodingSettings(max_length=9, pack=8)
    with pytest.raises(UsageError, match="--max-length -1"):
        EncodingSettings(max_length=-1)
