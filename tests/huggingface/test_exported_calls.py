"""An exported model as callers of the transformers library use and misuse it: on tiny models made in the test."""

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from test_callers import save_byte_tokenizer
from test_exported_batches import HYBRID, TOLERANCE, make_model, padded, random_tokens
from test_logits import assert_near, megatron_logits
from test_modeling import MODELS, TOKENS
from transformers import AutoTokenizer

from megatron_ksa.huggingface.config_json import write_config
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig
from megatron_ksa.huggingface.modeling.modeling_megatron_ksa import MegatronKSAForCausalLM

SUMMARIES, TEXT = HYBRID["summaries"], 60


@pytest.fixture
def hybrid():
    return make_model(**HYBRID)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("size", [55, 60, 61, 62, 63, 90])
@torch.no_grad()
def test_resized_embeddings_keep_the_summary_tokens(size, tied):
    """`resize_token_embeddings(len(tokenizer))`, which every recipe with a token of its own calls, cut off the summary
    tokens or left them where the model does not look for them: logits changed, and the new tokens had none."""
    model = make_model(**HYBRID, tie_word_embeddings=tied)
    model.tie_weights()
    ids = random_tokens(2, 30).clamp(max=54)
    expected = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    found = model(ids).logits
    assert found.shape == (2, 30, size) and model.config.vocab_size == size + SUMMARIES
    common = min(size, TEXT)
    assert (found[..., :common] - expected[..., :common]).abs().max() < TOLERANCE
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_resized_to_a_multiple(hybrid):
    ids = random_tokens(2, 30)
    expected = hybrid(ids).logits
    assert hybrid.resize_token_embeddings() is hybrid.get_input_embeddings()
    hybrid.resize_token_embeddings(61, pad_to_multiple_of=16, mean_resizing=False)
    found = hybrid(ids).logits
    assert found.shape[2] == 64 and (found[..., :TEXT] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["every kind of layer", "ksa, everything independent"])
def test_a_resized_model_is_imported(name, to_megatron, tmp_path):
    """Its configuration named the place where its summary tokens were before, and the import refused it."""
    config = write_config(MODELS[name], "float32")
    config.pop("auto_map")
    model = MegatronKSAForCausalLM(MegatronKSAConfig(**config)).eval()
    randomise(model, 1)
    model.tie_weights()
    model.resize_token_embeddings(66, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = megatron_logits(to_megatron(tmp_path / "resized", tmp_path / "megatron"), TOKENS)
    assert_near(expected, found[..., :66])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_transition_scores_of_a_batch(hybrid, beams, normalised):
    """The library takes scores of `config.vocab_size` words; those of the text alone gave every sample but the first
    the scores of other words, and an error where they are normalised."""
    ids = random_tokens(3, 9)
    made = hybrid.generate(
        ids, max_new_tokens=5, do_sample=False, num_beams=beams, return_dict_in_generate=True, output_scores=True
    )
    beam_indices = made.beam_indices if beams > 1 else None
    found = hybrid.compute_transition_scores(made.sequences, made.scores, beam_indices, normalize_logits=normalised)
    logits = hybrid(made.sequences[:, :-1]).logits[:, 8:]
    if beams > 1 or normalised:
        logits = logits.log_softmax(-1)
    wanted = logits.gather(2, made.sequences[:, 9:, None])[..., 0]
    assert (found - wanted).abs().max() < TOLERANCE


def test_stop_strings(hybrid, tmp_path):
    """`generate(stop_strings=..., tokenizer=...)` ended with an unknown argument `tokenizer` of `forward`."""
    save_byte_tokenizer(tmp_path)
    tokenizer, ids = AutoTokenizer.from_pretrained(tmp_path), random_tokens(1, 9)
    free = hybrid.generate(ids, max_new_tokens=12, do_sample=False)
    stop = tokenizer.decode(free[0, 13:15])
    made = hybrid.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(made, free[:, : made.shape[1]]) and 9 < made.shape[1] <= 15


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generation_in_training_mode(hybrid, checkpointing):
    """A sample between two training steps was refused: "no gradients flow through a cache"."""
    ids, mask = padded([random_tokens(n, seed=n) for n in (21, 5)], "left")
    expected = hybrid.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    hybrid.train()
    if checkpointing:
        hybrid.gradient_checkpointing_enable()
    assert torch.equal(hybrid.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False), expected)


def test_label_smoothing_shifts_the_labels(hybrid, tmp_path):
    """Trainer smooths the labels of models whose class it finds in a list of its own, and shifts them only there: the
    exported class was not in it, and learned to repeat its input."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids, epsilon = random_tokens(2, 24), 0.3
    settings = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, label_smoothing_factor=epsilon, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    found = Trainer(hybrid, settings, eval_dataset=data).evaluate()["eval_loss"]
    with torch.no_grad():
        logits = hybrid(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=epsilon)
    assert found == pytest.approx(expected.item(), rel=1e-4)


REFUSED = {
    "a mask of another batch": (dict(attention_mask=torch.ones(1, 10)), r"attention_mask of shape \(1, 10\): \[2, 10"),
    "a padded mask of another batch": (dict(attention_mask=torch.zeros(3, 10)), r"attention_mask of shape \(3, 10\)"),
    "positions of one dimension": (dict(position_ids=torch.arange(10)), r"position_ids of shape \(10,\)"),
    "positions of another batch": (dict(position_ids=torch.arange(10).expand(3, -1)), r"shape \(3, 10\): \[2, 10\]"),
    "labels for some tokens": (dict(labels=torch.zeros(2, 4).long()), r"labels of shape \(2, 4\): \(2, 10\) needed"),
    "labels without logits": (dict(labels=torch.zeros(2, 10).long(), logits_to_keep=1), "leave logits_to_keep out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_do_not_fit_are_named(hybrid, name):
    """They ended in errors of torch, a mask of another batch without padding was taken."""
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        hybrid(random_tokens(2, 10), **arguments)


def test_positions_of_a_step(hybrid):
    """Twenty positions for one token were taken: the shape was looked at in longer passes only."""
    with pytest.raises(ValueError, match=r"position_ids of shape \(1, 20\): \[2, 1\] or \[1, 1\] needed"):
        hybrid(random_tokens(2, 1), position_ids=torch.arange(20)[None])


@pytest.mark.parametrize("shape", [(2, 0), (0, 10), (10,)])
def test_tokens_of_no_batch(hybrid, shape):
    with pytest.raises(ValueError, match=r"tokens of shape .*: \[batch, columns\] needed"):
        hybrid(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("columns", [10, 7])
def test_a_cache_without_a_new_token(hybrid, columns):
    """The library then feeds the whole prompt again; what was said spoke of positions."""
    ids = random_tokens(2, 10)
    cache = hybrid(ids).past_key_values
    with pytest.raises(ValueError, match=f"past_key_values holds 10 columns, the inputs have {columns}: give generate"):
        hybrid.generate(ids[:, :columns], past_key_values=cache, max_new_tokens=3)
