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
PLAIN = "--no-ksa --position-embedding-type rope --train-iters 2"
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
    "centuries": ("--train-iters 99999999999", r"the index of 4e\+11 samples takes 4800 GB, this machine has"),
    "tokenizer of a device": (
        "--train-iters 2 --tokenizer-model /dev/zero", r"--tokenizer-model /dev/zero: neither a regular file nor a",
    ),
    "step 0": (f"--train-iters 2 {RESUME} --ckpt-step 0", r"--ckpt-step 0: iterations are numbered from 1"),
    "exit every 0": ("--train-iters 2 --exit-interval 0", r"--exit-interval is 0: it must be at least 1"),
    "exit after 0 minutes": ("--train-iters 2 --exit-duration-in-mins 0", r"--exit-duration-in-mins is 0"),
    "logs of nowhere": ("--train-iters 2 --wandb-project x", r"--wandb-project x needs a folder: give --w"),
    "data of another program": ("--train-iters 2 --dataloader-type external", r"--dataloader-type external is for"),
    "no file of flags": ("--train-iters 2 --yaml-cfg {folder}/no.yaml", r"No such file or directory: .*/no.yaml"),
    "hashes every 0": (
        "--train-iters 2 --check-weight-hash-across-dp-replicas-interval 0", r"replicas-interval is 0: it must be at",
    ),
    "rejected nowhere": (
        "--train-iters 2 --result-rejected-tracker-filename {folder}/no/x", r"filename .*/no/x: .*/no is no folder",
    ),
    "phases of iterations": ("--train-iters 2 --phase-transition-iterations 1", r"goes with --train-samples"),
    "xavier": ("--train-iters 2 --init-method-xavier-uniform", r"--init-method-xavier-uniform is not accepted here: "),
    "no time": ("--train-iters 2 --distributed-timeout-minutes 0", r"--distributed-timeout-minutes is 0"),
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
        r"--max-position-embeddings 32 is below --seq-length 64: use 64 or more",
    ),
    "min lr above lr": (
        "--train-iters 2 --min-lr 1",
        r"Megatron does not accept --min-lr 1.0, --lr 0.001: args.min_lr <= args.lr must hold \(megatron/training/",
    ),
    "two sources": ("--train-iters 2 --mock-data", r"the data comes from --data-path and from --mock-data: give one"),
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
    "ids of another tokenizer": (
        "--train-iters 2 --data-path {folder}/far", r"far.bin has the token id 4,998, and the model has 128 rows"
    ),
    "no end": ("--save {folder}/no --save-interval 1", r"neither --train-iters nor --train-samples says how long"),
    "iterations below 0": ("--train-iters -5", r"--train-iters is -5: it must be at least 1"),
    "nothing to train on": ("--train-iters 2 --split 0,100,0", r"--split 0,100,0 leaves no data to train on"),
    "nothing to evaluate": ("--train-iters 2 --eval-iters 5", r"--split 100,0,0 leaves no data for the 5 iterations"),
    "evaluation every 0": ("--train-iters 2 --eval-interval 0", r"--eval-interval is 0: it must be at least 1"),
    "log every 0": ("--train-iters 2 --log-interval 0", r"--log-interval is 0"),
    "padding to 0": ("--train-iters 2 --make-vocab-size-divisible-by 0", r"--make-vocab-size-divisible-by is 0"),
    "no words": ("--train-iters 2 --vocab-size 0", r"--vocab-size is 0"),
    "negative deviation": ("--train-iters 2 --init-method-std -1", r"--init-method-std -1: a number of at least 0"),
    "groups without KSA": (f"{PLAIN} --num-query-groups 3", r"--num-query-groups 3 does not divide --num-att"),
    "ranks without KSA": (f"{PLAIN} --tensor-model-parallel-size 2", r"1 processes do not divide into --tensor-model"),
    "odd channels": (f"{PLAIN} --kv-channels 7", r"--kv-channels 7: channels are rotated in pairs"),
    "no base": (f"{PLAIN} --rotary-base 0", r"--rotary-base is 0"),
    "more than all": (f"{PLAIN} --rotary-percent 2", r"--rotary-percent 2: a share above 0"),
    "too many experts": (f"{PLAIN} --num-experts 4 --moe-router-topk 5", r"--moe-router-topk 5 is above --num-expert"),
    "a missing package": ("--train-iters 2 --optimizer lion", r"emerging-optimizers package is required"),
    "a cache that is a file": ("--train-iters 2 --data-cache-path {folder}/runs.json", r"Failed to write dataset"),
    "logs in a file": ("--train-iters 2 --tensorboard-dir {folder}/runs.json", r"File exists: .*runs.json"),
    "a load that is a file": ("--train-iters 2 --load {folder}/runs.json", r"--load .*runs.json is no folder"),
    "finetuning of nothing": ("--train-iters 2 --finetune --load {folder}/none", r"--finetune starts .*none has none"),
    "pretrained nowhere": ("--train-iters 2 --pretrained-checkpoint {folder}/none", r"--pretrained-checkp.* holds no"),
    "another width": (
        f"--train-iters 2 --hidden-size 64 {RESUME}",
        r"--hidden-size: the checkpoint was written with 32, the flags say 64: give the checkpoint's value",
    ),
    "another optimizer": (
        f"--train-iters 2 --optimizer sgd {RESUME}", r"--optimizer: the checkpoint was written with adam",
    ),
    "another precision": (f"--train-iters 2 --bf16 {RESUME}", r"--bf16 or --fp16: the checkpoint was written wi"),
    "a divided optimizer": (
        f"--train-iters 2 --use-distributed-optimizer {RESUME}", r"--use-distributed-optimizer: the checkpoint was",
    ),
    "no fused Adam": (
        "--train-iters 2 --use-distributed-optimizer --use-precision-aware-optimizer",
        r"Megatron does not accept --use-precision-aware-optimizer True: .*FusedAdam",
    ),
    "buckets": ("--train-iters 1 --use-distributed-optimizer --save {folder}/buckets --save-interval 1", None),
    "other buckets": (
        "--train-iters 1 --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 1 --load {folder}/buckets",
        r"--load .*/buckets: .* by buckets of the gradient buffer, and those of this run are others: give the checkp",
    ),
    "another rate": (f"--train-iters 2 --lr 5e-4 {RESUME}", r"give the checkpoint's --lr and --min-lr, or --no"),
    "a new optimizer": (
        f"--train-iters 3 --optimizer sgd --no-load-optim --override-opt-param-scheduler {RESUME}", None,
    ),
    "unequal heads": ("--train-iters 2 --num-attention-heads 5", r"--num-attention-heads 5 does not divide --hidd"),
    "batch of thirds": ("--train-iters 2 --micro-batch-size 3", r"--global-batch-size 4 is not .*: use 3 or 6"),
    "no data": ("--train-iters 2 --data-path {folder}/none", r"--data-path .*none: .*none.idx does not exist"),
    "two lengths": ("--train-iters 2 --train-samples 9", r"Megatron does not accept --train-samples 9: expected iter"),
    "two warm-ups": (
        "--train-iters 2 --lr-warmup-iters 1 --lr-warmup-fraction 0.5", r"can only specify one of lr-warmup-fraction",
    ),
    "two precisions": ("--train-iters 2 --fp16 --bf16", r"Megatron does not accept --bf16 True: not args.bf16"),
    "no Transformer Engine": (
        "--train-iters 2 --transformer-impl transformer_engine", r"transformer-engine is not installed.*-impl local$"
    ),
    "no GPU to profile": ("--train-iters 2 --profile", r"--profile marks a range .* add --use-pytorch-profiler"),
    "model of nothing": ("--train-iters 2 --use-checkpoint-args --load {folder}/none", r"--load .*/none has none"),
    "negative warm-up": ("--train-iters 2 --lr-warmup-iters=-1", r"--lr-warmup-iters -1: a number of at least 0"),
    "negative decay": (
        "--train-iters 2 --lr-decay-style WSD --lr-wsd-decay-iters=-1", r"--lr-wsd-decay-iters -1: a number of at",
    ),
    "clip at nothing": ("--train-iters 2 --clip-grad nan", r"--clip-grad nan: a number of at least 0 is needed"),
    "no tokenizer": (
        "--train-iters 2 --tokenizer-type SentencePieceTokenizer", r"Tokenizer path must be specified",
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
    with IndexedDatasetWriter(str(folder / "far"), 5000) as writer:
        writer.add_document(list(range(4000, 4999)))
    for case in CASES.glob("*.txt"):
        (folder / case.name).write_text(case.read_text().replace("data/", f"{folder}/data/"))
    runs = []
    for flags, _ in RUNS.values():
        words = flags.format(folder=folder).split()
        given = {"--data-args-path", "--data-path"} & set(words)
        data = [] if given else ["--data-path", str(folder / "documents")]
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
