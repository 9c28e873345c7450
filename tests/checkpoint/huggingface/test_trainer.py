"""`pretrain_gpt.py` takes an imported checkpoint, its architecture too, and what it saves can be exported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from models import GOLDEN, LENGTH, VOCABULARY, save_family
from test_logits import assert_near, megatron_logits, transformers_logits

from megatron_ksa.checkpoint.load import find_checkpoint

RECORDED = Path(__file__).parents[2] / "training" / "recorded_pretrain.py"
# One sequence over and over: every sample of the dataset is the same LENGTH + 1 tokens.
PATTERN = np.random.default_rng(0).integers(3, VOCABULARY, LENGTH)
TRAINING = (
    f"--use-checkpoint-args --seq-length {LENGTH} --micro-batch-size 1 --global-batch-size 2 --train-iters 1 "
    f"--split 100,0,0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --lr 1e-9 --save-interval 1 "
    f"--eval-iters 0 --ckpt-format torch_dist"
).split()


def pretrain(folder: Path, flags: list[object], processes: int = 1) -> subprocess.CompletedProcess:
    """One iteration, recorded in folder/record.json; saves to folder/saved."""
    prefix = folder / "documents"
    with IndexedDatasetWriter(str(prefix), VOCABULARY) as writer:
        writer.add_document(np.tile(PATTERN, 20))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    flags = [*TRAINING, "--data-path", prefix, "--save", folder / "saved", *flags]
    runs = [{"record": str(folder / "record.json"), "flags": list(map(str, flags))}]
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [*launcher, RECORDED, folder / "runs.json"]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def first_loss(folder: Path) -> float:
    """Next-token loss of the exported model on the pattern."""
    tokens = torch.tensor(np.append(PATTERN, PATTERN[0]))
    logits = transformers_logits(folder, tokens[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0], tokens[1:]).item()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama3", "--pipeline-model-parallel-size 1"), ("ksa", "--tensor-model-parallel-size 2 --sequence-parallel")],
)
def test_training_starts_from_the_imported_model(family, layout, to_megatron, to_huggingface, tmp_path):
    """The trainer's first loss is the exported model's, and what it saves exports again, from any layout.

    Megatron alone drops the factor of Llama 3's rope scaling, and takes neither Q/K norm nor KSA from a checkpoint.
    """
    if family == "ksa":
        source = GOLDEN
    else:
        source = tmp_path / "hf"
        save_family(family, source)
    megatron = to_megatron(source, tmp_path / "megatron", seq_length=LENGTH)
    expected = first_loss(to_huggingface(megatron, tmp_path / "exported"))
    done = pretrain(tmp_path, ["--load", megatron, *layout.split()], processes=1 + (family == "ksa"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "record.json").read_text())["1"]["loss"] == pytest.approx(expected, rel=1e-5)
    saved = tmp_path / "saved"
    assert find_checkpoint(saved).args.tensor_model_parallel_size == 1 + (family == "ksa")
    tokens = torch.tensor(PATTERN)[None]
    assert_near(transformers_logits(to_huggingface(saved, tmp_path / "again"), tokens), megatron_logits(saved, tokens))
