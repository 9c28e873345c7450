"""`pretrain_gpt.py` takes an imported checkpoint, its architecture too, and what it saves can be exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import GOLDEN, LENGTH, VOCABULARY, save_family
from renamed_norms import rename_norms
from test_logits import assert_near, megatron_logits, transformers_logits
from warm import run_script

from megatron_ksa.checkpoint.load import RELEASE, find_checkpoint, load_model
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.inference import Generator, Request, SamplingSettings
from megatron_ksa.platform import trainer_defaults

pytestmark = pytest.mark.slow
RECORDED = Path(__file__).parents[1] / "training" / "recorded_pretrain.py"
# One sequence over and over: every sample of the dataset is the same LENGTH + 1 tokens.
PATTERN = np.random.default_rng(0).integers(3, VOCABULARY, LENGTH)
TRAINING = (
    f"--use-checkpoint-args --seq-length {LENGTH} --micro-batch-size 1 --global-batch-size 2 --train-iters 1 "
    f"--split 100,0,0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --lr 1e-9 --save-interval 1 "
    f"--eval-iters 0 --ckpt-format torch_dist"
).split()
LAYOUTS = {"llama3": "--tensor-model-parallel-size 2", "ksa": "--pipeline-model-parallel-size 2"}


def first_loss(folder: Path) -> float:
    """Next-token loss of the exported model on the pattern."""
    tokens = torch.tensor(np.append(PATTERN, PATTERN[0]))
    logits = transformers_logits(folder, tokens[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0], tokens[1:]).item()


@pytest.fixture(scope="module")
def trained(to_megatron, tmp_path_factory) -> Path:
    """A folder for each family: the imported checkpoint, one iteration from it in two processes, and its record."""
    root = tmp_path_factory.mktemp("trained")
    save_family("llama3", root / "llama3" / "hf")
    with IndexedDatasetWriter(str(root / "documents"), VOCABULARY) as writer:
        writer.add_document(np.tile(PATTERN, 20))
    runs = []
    for family, source in (("llama3", root / "llama3" / "hf"), ("ksa", GOLDEN)):
        folder = root / family
        imported = to_megatron(source, folder / "megatron", seq_length=LENGTH)
        rename_norms(imported / RELEASE)
        flags = [*TRAINING, "--data-path", root / "documents", "--load", imported, "--save", folder / "saved"]
        flags = [str(word) for word in [*flags, *LAYOUTS[family].split()]]
        runs.append({"record": str(folder / "record.json"), "flags": flags})
    (root / "runs.json").write_text(json.dumps(runs))
    done = run_script(RECORDED, root / "runs.json", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("family", LAYOUTS)
def test_training_starts_from_the_imported_model(family, trained, to_huggingface):
    """The trainer's first loss is the exported model's; norms have the names of specs that keep them apart.

    Megatron alone drops the factor of Llama 3's rope scaling, and takes neither Q/K norm nor KSA from a checkpoint.
    """
    folder = trained / family
    expected = first_loss(to_huggingface(folder / "megatron", folder / "exported"))
    assert json.loads((folder / "record.json").read_text())["1"]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_it_saves_is_exported(family, trained, to_huggingface):
    """From whatever parallel layout it was saved in."""
    saved = trained / family / "saved"
    args = find_checkpoint(saved).args
    assert args.tensor_model_parallel_size * args.pipeline_model_parallel_size == 2
    tokens = torch.tensor(PATTERN)[None]
    exported = to_huggingface(saved, trained / family / "again")
    assert_near(transformers_logits(exported, tokens), megatron_logits(saved, tokens))


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_it_saves_generates(family, trained, to_huggingface):
    """What two tensor- or pipeline-parallel ranks saved goes on, in one process, like the exported model."""
    saved, prompts = trained / family / "saved", [PATTERN[:20].tolist(), PATTERN[7:12].tolist()]
    model = load_model(find_checkpoint(saved), trainer_defaults(), torch.float32)
    greedy = SamplingSettings(temperature=0.0, max_new_tokens=12)
    generator = Generator(model, max_batch=2, max_length=LENGTH)
    made = [list(done.tokens) for done in generator.generate([Request(prompt, greedy) for prompt in prompts])]
    exported = to_huggingface(saved, trained / family / "generating")
    for prompt, tokens in zip(prompts, made, strict=True):
        for new in tokens:
            assert transformers_logits(exported, torch.tensor([prompt]))[0, -1].argmax().item() == new
            prompt.append(new)
    assert [len(tokens) for tokens in made] == [12, 12]
