"""Greedy decoding for evaluation: what the full forward says token by token, whatever the batch."""

import json

import pytest
import torch
from single_process import build_model, random_tokens

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.generation import HuggingFaceGreedy, MegatronGreedy, in_batches
from megatron_ksa.evaluation.needle import Case, decoded, score_cases
from megatron_ksa.evaluation.token_language import TokenLanguage
from megatron_ksa.huggingface.loading import load_for_generation

KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="2")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(KSA).eval()


@pytest.fixture(scope="module")
def prompts():
    return [part.tolist() for part in random_tokens(1, 42)[0].split([9, 23, 9, 1])]


def full_forward(model, prompt, new_tokens):
    tokens = list(prompt)
    for _ in range(new_tokens):
        # The full forward takes whole chunks: what stands behind a token is not seen by it.
        padded = torch.tensor([tokens + [0] * (-len(tokens) % 4)])
        with torch.no_grad():
            logits = model(padded, torch.arange(padded.shape[1])[None])
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_megatron_greedy_is_the_full_forward(model, prompts):
    made = MegatronGreedy(model)(prompts, 11)
    assert made == [full_forward(model, prompt, 11) for prompt in prompts]
    stop = made[1][4]
    ended = MegatronGreedy(model, [stop])(prompts, 11)
    assert ended == [row[: row.index(stop)] if stop in row else row for row in made]


def test_an_answer_is_exact_by_decoding_where_it_is_by_forcing(model, prompts):
    """`exact` of one forward pass is that of greedy decoding: for answers that the model writes, and nearly those."""
    cases = []
    for prompt in prompts[:3]:
        answer = full_forward(model, prompt, 6)
        for change in range(-1, 6):
            pieces = [answer[:2], answer[2:]]
            if change >= 0:
                pieces[change >= 2][change - 2 * (change >= 2)] += 1
            cases.append(Case(prompt, pieces, (" 1 ",), 6))
    forced = [exact for exact, _ in score_cases(model, cases)]
    assert forced == [exact for exact, _ in decoded(MegatronGreedy(model), TokenLanguage(), cases)]
    assert forced == [True, *[False] * 6] * 3


def test_batches():
    assert [len(batch) for batch in in_batches(range(7), 100, 350)] == [3, 3, 1]
    assert [len(batch) for batch in in_batches(range(2), 100, 50)] == [1, 1]


def test_hugging_face_greedy(prompts, tmp_path):
    """Prompts of a padded batch get the text of single ones, up to a token that ends it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=1.0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_for_generation(tmp_path)
    prompts = [[token % 128 for token in prompt] for prompt in prompts]
    # The folder's own settings were taken on: a penalty of repetitions, as in Qwen 2.5's, gave other texts than greedy.
    model.generation_config.update(eos_token_id=None, repetition_penalty=3.0, no_repeat_ngram_size=1)
    made = HuggingFaceGreedy(model)(prompts, 11)
    for prompt, row in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for token in row:
            with torch.no_grad():
                assert int(model(torch.tensor([tokens])).logits[0, -1].argmax()) == token
            tokens.append(token)
        assert len(row) == 11
    stop = made[1][4]
    ended = HuggingFaceGreedy(model, [stop])(prompts, 11)
    assert ended == [row[: row.index(stop)] if stop in row else row for row in made]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3", "use_summary_attention": True}, "would leave out this model's summaries"),
        ({"model_type": "gone"}, "cannot be loaded"),
        ({"model_type": "llama"}, "cannot be loaded"),
    ],
)
def test_folders_that_cannot_be_loaded(config, message, tmp_path):
    """A released KSA model is a Qwen 3 to the transformers library, which drops its summary projections."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        load_for_generation(tmp_path)
