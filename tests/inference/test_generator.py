"""Generation for many requests: continuous batching, sampling, stop strings, text as it grows."""

import pytest
import torch
from exact import full_logits
from single_process import build_model, random_tokens

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.needle import Case, score_cases
from megatron_ksa.inference import DecodingState, Generator, Request, SamplingSettings
from megatron_ksa.inference.sampling import RandomStream, choose
from megatron_ksa.inference.text import GrowingText

KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 0, 2]", layer_pattern="kklf")


class Bytes:
    """A token is a byte."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model():
    return build_model(KSA, bases=(1e4, 5e5)).eval()


def prompts(count):
    return [random_tokens(1, 3 + 7 * i % 23, seed=i)[0].tolist() for i in range(count)]


def test_greedy_texts_are_those_of_the_full_forward(model):
    requests = [Request(prompt, SamplingSettings(max_new_tokens=3 + i % 5)) for i, prompt in enumerate(prompts(7))]
    for request, found in zip(requests, Generator(model, 3, 40, segment=5).generate(requests), strict=True):
        tokens = list(request.prompt)
        for _ in range(request.sampling.max_new_tokens):
            tokens.append(full_logits(model, torch.tensor(tokens))[-1].argmax().item())
        assert found.tokens == tokens[len(request.prompt) :] and found.finish == "max_new_tokens"


@pytest.mark.parametrize("every_slot", [False, True])
def test_same_seed_same_text_whatever_the_batch(model, every_slot):
    requests = [
        Request(prompt, SamplingSettings(temperature=1.5, top_k=20 * (i % 2), top_p=[1.0, 0.7][i // 2 % 2], seed=i,
                max_new_tokens=4 + i % 9))
        for i, prompt in enumerate(prompts(9))
    ]  # fmt: skip
    found = []
    for max_batch in (1, 2, 8):
        generator = Generator(model, max_batch, 40, segment=6, every_slot=every_slot)
        found.append([each.tokens for each in generator.generate(requests)])
    backwards = Generator(model, 3, 60, every_slot=every_slot).generate(requests[::-1])
    found.append([each.tokens for each in backwards[::-1]])
    assert all(tokens == found[0] for tokens in found[1:])
    assert len({tuple(tokens[:3]) for tokens in found[0]}) > 5


def test_a_text_ends_at_an_end_token_and_at_max_length(model):
    (free,) = Generator(model, 1, 64).generate([Request([1, 2, 3], SamplingSettings(max_new_tokens=20))])
    end = free.tokens[7]
    (ended,) = Generator(model, 1, 64, end_tokens=[end]).generate([Request([1, 2, 3])])
    assert ended.tokens == free.tokens[: free.tokens.index(end) + 1] and ended.finish == "end"
    (cut,) = Generator(model, 1, 12).generate([Request([1, 2, 3])])
    assert cut.tokens == free.tokens[:9] and cut.finish == "max_length"


def test_stop_strings(model):
    ask = SamplingSettings(max_new_tokens=20)
    (free,) = Generator(model, 1, 64, tokenizer=Bytes()).generate([Request([1, 2, 3], ask)])
    stop = free.text[6:9]
    at = free.text.index(stop)
    pieces = []
    generator = Generator(model, 1, 64, tokenizer=Bytes())
    request = Request([1, 2, 3], SamplingSettings(max_new_tokens=20, stop=("never comes", stop)))
    (found,) = generator.as_completed([request], lambda index, text: pieces.append(text))
    assert found.text == free.text[:at] == "".join(pieces) and found.finish == "stop"
    assert len(found.tokens) == at + 3
    (never,) = generator.generate([Request([1, 2, 3], SamplingSettings(max_new_tokens=20, stop=("never comes",)))])
    assert never == free and free.finish == "max_new_tokens"


def test_padded_words_are_never_chosen(model):
    """Embeddings are padded to a multiple; nothing was trained there."""
    settings = SamplingSettings(temperature=50.0, max_new_tokens=30)
    (found,) = Generator(model, 1, 64, vocabulary=5).generate([Request([1, 2, 3], settings)])
    assert max(found.tokens) < 5


def test_teacher_forcing_scores_what_greedy_decoding_writes():
    """Exact match under teacher forcing: the decoded answer is right, the answer with one other token is not."""
    model = build_model(KSAConfig(), bases=(1e4, 5e5)).eval()
    prompt = random_tokens(1, 30)[0].tolist()
    (found,) = Generator(model, 1, 64).generate([Request(prompt, SamplingSettings(max_new_tokens=6))])
    wrong = found.tokens[:4] + [(found.tokens[4] + 1) % 64, found.tokens[5]]
    cases = [Case(prompt, [a[:2], a[2:]]) for a in (found.tokens, wrong)]
    scores = score_cases(model, [*cases, Case(prompt[:7], [[0]])])
    assert scores[:2] == [(True, 1.0), (False, 0.5)]


def test_an_abandoned_run_frees_its_slots(model):
    generator = Generator(model, 2, 64)
    requests = [Request(prompt, SamplingSettings(max_new_tokens=9)) for prompt in prompts(4)]
    for _ in generator.as_completed(requests):
        break
    assert len(generator.generate(requests)) == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty"),
        (Request([1] * 16), "16 tokens: with its text it has at most 16"),
        (Request([1, 64]), "ids from 1 to 64: the model has 64 words"),
        (Request([1], SamplingSettings(stop=("x",))), "found by a tokenizer"),
    ],
)
def test_requests_that_cannot_run(model, request_, message):
    with pytest.raises(UsageError, match=message):
        Generator(model, 1, 16).generate([Request([1]), request_])


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": "hot"}, {"top_k": -1}, {"top_k": 1.5},
     {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"max_new_tokens": 0}, {"stop": ("",)}, {"stop": "text"}],
)  # fmt: skip
def test_settings_out_of_range(values):
    name = next(iter(values)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} "):
        SamplingSettings(**values)


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.5}],
)
def test_sampled_tokens_have_the_settings_distribution(settings):
    """Frequencies of 4,000 draws against the definition, word by word."""
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, -3.0])
    settings = SamplingSettings(**{"temperature": 1.0, **settings})
    expected = (logits / settings.temperature).softmax(-1)
    order = expected.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for word in order[: settings.top_k or None]:
        if total >= settings.top_p:
            break
        kept.append(word)
        total += expected[word].item()
    wanted = torch.zeros(6).index_copy(0, torch.tensor(kept), expected[kept]) / expected[kept].sum()
    count, stream = 4000, RandomStream(0)
    drawn = choose(logits.expand(count, -1), [settings] * count, [stream] * count)
    found = torch.bincount(drawn, minlength=6) / count
    assert (found - wanted).abs().max() < 0.03 and not found[wanted == 0].any()


def test_text_grows_by_whole_characters():
    """Each character once, in the order of its bytes; bytes that never become one are shown at the end."""
    text, given = GrowingText(Bytes().decode, b"before "), []
    for byte in "aé€😀b".encode() + b"\xe2\x82":
        text.add(byte)
        given.append(text.news())
    text.finish()
    given.append(text.news(final=True))
    assert "".join(given) == text.text == "aé€😀b\N{REPLACEMENT CHARACTER}"
    assert given[1:3] == ["", "é"]


def test_the_start_of_a_stop_string_is_kept_back():
    text = GrowingText(Bytes().decode, b"", ["END."])
    given = []
    for byte in b"an ENEND of EN":
        text.add(byte)
        given.append(text.news())
    assert "".join(given) == "an ENEND of " and not text.stopped
    for byte in b"D. more":
        text.add(byte)
        given.append(text.news())
    assert "".join(given) == "an ENEND of " == text.text and text.stopped


@pytest.mark.parametrize(
    "extreme",
    [{"temperature": 5e-324}, {"temperature": 1e-46}, {"temperature": 1.0, "top_p": 1e-300},
     {"temperature": 1.0, "top_p": 1e-46}, {"temperature": 1.0, "top_k": 2**70}, {"temperature": 10**30}],
    ids=str,
)  # fmt: skip
def test_extreme_settings(extreme):
    """Settings went through float32, in which 1e-46 is 0, and through int64: words below 0, and tracebacks."""
    settings = SamplingSettings(**extreme)
    logits = torch.tensor([[0.1, 2.0, -1.0, 1.5], [30.0, 2.0, -1.0, 31.0]])
    tokens = choose(logits, [settings] * 2, [RandomStream(seed) for seed in (1, 2)])
    assert ((tokens >= 0) & (tokens < 4)).all()
    if settings.temperature < 0.1 or settings.top_p < 0.1:
        assert tokens.tolist() == [1, 3]


@pytest.mark.parametrize("values", [{"temperature": 10**400}, {"top_p": -(10**400)}, {"temperature": float("inf")}])
def test_numbers_beyond_floats(values):
    """An integer of 400 digits in a record ended the whole run with an OverflowError."""
    with pytest.raises(UsageError, match="a number is needed"):
        SamplingSettings(**values)


def test_logits_that_are_no_numbers(model, monkeypatch):
    """A float16 model that overflows wrote the first word of its vocabulary on and on, and said nothing."""
    decode = DecodingState.decode

    def overflowing(state, slots, tokens):
        logits = decode(state, slots, tokens)
        logits[0, 3] = float("nan")
        return logits

    monkeypatch.setattr(DecodingState, "decode", overflowing)
    with pytest.raises(UsageError, match=r"logits are not finite \(prompt 0\): try --dtype bfloat16"):
        Generator(model, 2, 32).generate([Request(prompt) for prompt in prompts(2)])
