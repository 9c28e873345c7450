"""What users reach by a flag, a file or a resume, and what Megatron meets with assertions: one line, exit code 2."""

import json
import re
from pathlib import Path

import pytest
import torch
from trainer import MODEL, TRAINING, write_documents
from warm import run_script

from megatron_ksa.checkpoint.streaming import DistributedReader, Slot
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.slow
CASES = Path(__file__).parent / "cases"
TWO = "--train-iters 2 --save {folder}/saved --save-interval 1 --seed 1"
RESUME = "--load {folder}/saved --save {folder}/again --save-interval 10"
# Name: flags, and what the line says; without one the run must work.
RUNS = {
    "first": (TWO, None),
    "sgd": ("--train-iters 2 --optimizer sgd --save {folder}/sgd --save-interval 1", None),
    "sgd resumed": (
        "--train-iters 3 --optimizer sgd --load {folder}/sgd --override-opt-param-scheduler --save {folder}/sgd-again "
        "--save-interval 3", None,
    ),
    "sgd whole": ("--train-iters 3 --optimizer sgd --save {folder}/sgd-whole --save-interval 3", None),
    "more iterations": (
        f"--train-iters 5 {RESUME}",
        r"OptimizerParamScheduler: .*total number of iterations.*; --override-opt-param-scheduler takes",
    ),
    "another batch": (
        f"--train-iters 2 --global-batch-size 8 {RESUME}",
        r"--override-opt-param-scheduler takes the schedule of the flags \(--lr, --train-iters, --global-batch-size",
    ),
    "missing step": (
        f"--train-iters 2 {RESUME} --ckpt-step 7",
        r"--ckpt-step 7: .*/saved has no checkpoint iter_0000007: .*; iterations there: 1, 2$",
    ),
    "step of nothing": ("--train-iters 2 --load {folder}/none --ckpt-step 7", r"--ckpt-step 7: --load .*none holds no"),
    "save without interval": ("--train-iters 2 --save {folder}/no", r"--save .*/no needs .*--save-interval is missing"),
    "warm-up too long": ("--train-iters 2 --lr-warmup-iters 5", r"lr_warmup_steps < self.lr_decay_steps must hold"),
    "rampup": ("--train-iters 2 --rampup-batch-size 1 1 8", r"--rampup-batch-size is not accepted .*step-batch-size"),
    "negative split": ("--train-iters 2 --split=-1,1,0", r"--split -1,1,0: give up to three numbers of 0 or more"),
    "no number in split": ("--train-iters 2 --split 90,abc5,5", r"--split 90,abc5,5: give up to three numbers"),
    "empty split": ("--train-iters 2 --split 0,0,0", r"--split 0,0,0: .*at least one above 0"),
    "zero weight": (
        "--train-iters 2 --data-args-path {folder}/blend_zero_weight.txt",
        r"blend_zero_weight.txt, line 1: the weight is 0: a number above 0 is needed",
    ),
    "comment": ("--train-iters 2 --data-args-path {folder}/blend_with_comment.txt", None),
    "gather without reduce": (
        "--train-iters 2 --overlap-param-gather",
        r"--use-distributed-optimizer False.*: --overlap-param-gather only supported with distributed optimizer",
    ),
    "grads not a multiple": (
        "--train-iters 2 --eval-global-batch-size 3 --eval-micro-batch-size 2",
        r"Megatron does not accept --eval-global-batch-size 3, --eval-micro-batch-size 2",
    ),
    "too long for positions": (
        "--no-ksa --position-embedding-type rope --train-iters 2 --max-position-embeddings 32",
        r"Megatron does not accept --max-position-embeddings 32, --seq-length 64",
    ),
    "min lr above lr": (
        "--train-iters 2 --min-lr 1",
        r"Megatron does not accept --min-lr 1.0, --lr 0.001: args.min_lr <= args.lr must hold \(megatron/training/",
    ),
    "two sources": ("--train-iters 2 --mock-data", r"the data comes from --mock-data and from --data-path: give one"),
    "window": ("--train-iters 2 --window-size 8,0", r"--ksa does not go with --window-size: "),
    "without KSA it is Megatron's": (
        "--no-ksa --position-embedding-type rope --train-iters 1 --softmax-type off-by-one", None
    ),
    "sft": ("--no-ksa --position-embedding-type rope --train-iters 1 --sft", r"--sft is not accepted here: "),
    "frozen": ("--train-iters 2 --freeze-all-layers --save {folder}/frozen --save-interval 1", None),
    "spikes": ("--train-iters 2 --check-for-spiky-loss --log-straggler --timing-log-level 2", None),
    "harpe in one word": ("--train-iters 1 --position-embedding-type=harpe", None),
    "logits of nowhere": ("--train-iters 1 --logits-load-dir {folder}/no", r"--logits-load-dir .*/no: no .tar files"),
    "logits saved": (
        "--train-iters 2 --freeze-all-layers --logits-save-dir {folder}/logits --logits-save-top-k 8 --async-save "
        "--save {folder}/teacher --save-interval 2", None,
    ),
    "logits in float32": ("--train-iters 2 --logits-load-dir {folder}/logits", r"needs --bf16 or --fp16: "),
    "logits loaded": (
        "--bf16 --train-iters 2 --logits-load-dir {folder}/logits --logits-load-kd-loss-alpha 0.5", None
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder, for each run its exit code and error lines, and what all of them printed."""
    folder = tmp_path_factory.mktemp("refused")
    write_documents(folder / "documents")
    (folder / "data").mkdir()
    for name in ("books_text_document", "code_text_document"):
        with IndexedDatasetWriter(str(folder / "data" / name), 127) as writer:
            writer.add_document(list(range(100)) * 10)
    for case in CASES.glob("*.txt"):
        (folder / case.name).write_text(case.read_text().replace("data/", f"{folder}/data/"))
    runs = []
    for flags, _ in RUNS.values():
        words = flags.format(folder=folder).split()
        data = [] if "--data-args-path" in words else ["--data-path", str(folder / "documents")]
        runs.append([*MODEL, *TRAINING, *data, *words])
    (folder / "runs.json").write_text(json.dumps(runs))
    written = folder / "results.json"
    done = run_script(Path(__file__).with_name("refused_pretrain.py"), folder / "runs.json", written)
    found = json.loads(written.read_text()) if written.exists() else []
    assert len(found) == len(runs), (list(RUNS)[len(found)], done.stderr[-3000:])
    return folder, dict(zip(RUNS, found, strict=True)), done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_one_line_or_training(results, name):
    expected = RUNS[name][1]
    code, lines = results[1][name]
    assert code == (0 if expected is None else 2), lines
    assert len(lines) == (0 if expected is None else 1), lines
    if expected is not None:
        assert re.search(expected, lines[0]), lines[0]


def test_sgd_goes_on_with_its_momentum(results):
    """A resume of --optimizer sgd ended in `'NoneType' object is not callable`."""
    folder = results[0]
    again, whole = (stored_weights(folder / name, 3) for name in ("sgd-again", "sgd-whole"))
    assert again and all(torch.equal(again[name], whole[name]) for name in whole)


def test_flags_that_did_nothing_act(results):
    """`--freeze-all-layers` and `--logits-load-dir` were without effect, and `--logits-save-dir` would save nothing."""
    folder, _, printed = results
    first, second = (stored_weights(folder / "frozen", iteration) for iteration in (1, 2))
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (stored_weights(folder / "saved", iteration) for iteration in (1, 2))
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert list((folder / "logits").glob("*.tar"))
    assert printed.count("logits distillation loss:") == 2 and printed.count("total loss:") == 2


def stored_weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Weight matrices of one iteration, by name."""
    reader = DistributedReader(folder / f"iter_{iteration:07d}")
    names = [name for name in reader.tensors if name.endswith("weight") and not name.startswith("optimizer")]
    return {name: reader.read(Slot.whole(name, tuple(reader.tensors[name].size))) for name in names}
