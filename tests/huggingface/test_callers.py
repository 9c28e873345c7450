"""What calls an exported model: Trainer, pipeline and lm-evaluation-harness, from a folder that the exporter wrote."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from models import randomise
from test_modeling import MODELS
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from megatron_ksa.huggingface.config_json import write_config
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig
from megatron_ksa.huggingface.modeling.modeling_megatron_ksa import MegatronKSAForCausalLM

pytestmark = pytest.mark.slow
TASKS = Path(__file__).with_name("harness_tasks")
VOCABULARY = 258


def save_byte_tokenizer(folder: Path) -> None:
    """A token a byte, and two special ones."""
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.model_input_names = ["input_ids", "attention_mask"]
    assert len(fast) == VOCABULARY
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def exported(to_megatron, to_huggingface, tmp_path_factory) -> Path:
    """A hybrid with random weights as the exporter writes it, with a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("callers")
    arch = dataclasses.replace(
        MODELS["every kind of layer"], vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, max_positions=512,
        seq_length=512,
    )  # fmt: skip
    config = write_config(arch, "float32")
    config.pop("auto_map")
    model = MegatronKSAForCausalLM(MegatronKSAConfig(**config))
    randomise(model, 1)
    model.save_pretrained(root / "random")
    save_byte_tokenizer(root / "random")
    megatron = to_megatron(root / "random", root / "megatron")
    return to_huggingface(megatron, root / "exported", like=root / "random")


@pytest.fixture
def model(exported):
    return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)


def train(model, folder: Path, **arguments):
    """The losses of four steps of Trainer on texts of several lengths, padded on the right."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 7, 23, 64) * 4]

    def collate(batch):
        ids = torch.nn.utils.rnn.pad_sequence([row["row"] for row in batch], batch_first=True)
        lengths = torch.tensor([len(row["row"]) for row in batch])[:, None]
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=[{"row": row} for row in rows], data_collator=collate)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_gradient_checkpointing(exported, model, tmp_path, monkeypatch):
    """The same losses as without; every layer runs again in the backward pass."""
    plain = train(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    layer, calls = again.model.layers[0].self_attn, []
    layer.register_forward_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    found = train(again, tmp_path, gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-4) and len(found) == 4 and found[-1] < found[0]
    assert len(calls) == 2 * 2 * 4  # twice for each of two batches a step
    assert all(map(math.isfinite, found))


def test_gradients_with_checkpointing(model):
    """Every parameter has the gradient that it has without, summary parameters and norms too."""
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    found = []
    model.train()
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert found[0]["model.layers.1.self_attn.k_proj_summary.weight"].abs().max() > 0
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-8), name


def test_no_gradient_through_a_cache(model):
    model.train()
    ids = torch.zeros(1, 4, dtype=torch.long)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no gradients flow through a cache"):
        model(ids, past_key_values=cache)


def test_pipeline(exported):
    """A batch of prompts of several lengths gives each prompt's own text."""
    tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left")
    writer = pipeline("text-generation", str(exported), tokenizer=tokenizer, trust_remote_code=True, device="cpu")
    prompts = ["The grass is green. The sky", "A", "Here we go. There"]
    settings = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
    together = [made[0]["generated_text"] for made in writer(prompts, batch_size=3, **settings)]
    assert together == [writer(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    assert len(set(together)) == 3


def test_lm_evaluation_harness(exported, monkeypatch, tmp_path):
    """Batches of four give the scores, likelihoods and texts of single requests."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    manager, found = TaskManager(include_path=str(TASKS), include_defaults=False), []
    for size in (1, 4):
        harness = HFLM(pretrained=str(exported), trust_remote_code=True, batch_size=size, dtype="float32", device="cpu")
        found.append(
            lm_eval.simple_evaluate(harness, tasks=["colours", "endings"], task_manager=manager, bootstrap_iters=0)
        )
    alone, together = found
    assert alone["results"] == together["results"] and 0 < alone["results"]["colours"]["acc,none"] < 1
    for task in ("colours", "endings"):
        assert len(alone["samples"][task]) == 7
        for one, other in zip(alone["samples"][task], together["samples"][task], strict=True):
            assert one["doc_id"] == other["doc_id"]
            if task == "endings":
                assert one["resps"] == other["resps"]
                continue
            for mine, theirs in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=1e-4)
