"""The trainer in one, two and four processes, and resumed: the numbers of the undisturbed single process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm --qk-layernorm --swiglu "
    "--disable-bias-linear --hidden-dropout 0 --untie-embeddings-and-output-weights "
    "--ksa --ksa-layer-pattern klkf --ksa-window-chunks 2 "
    "--position-embedding-type harpe --harpe-base-min 1e4 --harpe-base-max 1e5"
).split()
# 64 x 2 words are no padding at tensor-parallel sizes 1 and 2: a different padding is a different softmax.
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 4 --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 64 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --log-interval 1 --eval-iters 0 "
    "--ckpt-format torch_dist"
).split()
PACKED = "--reset-position-ids --reset-attention-mask"
TOLERANCE = 1e-5
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
TP, SP, PP = "--tensor-model-parallel-size 2", "--sequence-parallel", "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP} --num-virtual-stages-per-pipeline-rank 2"
CP, CP_4 = "--context-parallel-size 2", "--context-parallel-size 4"
OPTIMIZER = "--use-distributed-optimizer"
OVERLAP = f"{OPTIMIZER} --overlap-grad-reduce --overlap-param-gather"
EITHER = ("", PACKED)
# Processes, flags of a layout, and the documents to train it on; the first is what the others are compared with.
LAYOUTS = [
    (1, "", EITHER),
    (1, RECOMPUTE, [PACKED]),
    (2, OPTIMIZER, [PACKED]),
    (2, TP, [""]),
    (2, f"{TP} {SP}", EITHER),
    (2, f"{TP} {SP} {RECOMPUTE}", [""]),
    (2, PP, EITHER),
    (2, f"{PP} {RECOMPUTE}", [""]),
    (2, INTERLEAVED, EITHER),
    (2, CP, EITHER),
    (2, f"{CP} {RECOMPUTE}", [PACKED]),
    (2, f"{CP} {SELECTIVE}", [""]),
    (2, f"{CP} --cp-comm-type a2a", [PACKED]),
    (4, CP_4, EITHER),
    (4, f"{TP} {SP} {CP}", EITHER),
    (4, f"{TP} {SP} {CP} {RECOMPUTE}", [""]),
    (4, f"{PP} {CP} {OPTIMIZER}", [PACKED]),
    (4, f"{TP} {PP} {OVERLAP}", EITHER),
]
CASES = [(size, layout, documents) for size, layout, either in LAYOUTS for documents in either]
END_OF_DOCUMENT = 126


def write_documents(prefix: Path) -> None:
    """A dataset of documents of 2 to 60 tokens: several in a sequence."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), 127) as writer:
        for length in random.integers(1, 60, 200):
            writer.add_document(np.append(random.integers(0, END_OF_DOCUMENT, length), END_OF_DOCUMENT))


def launch(runs: list[tuple[Path, str]], processes: int) -> subprocess.CompletedProcess:
    """Train once for each (record, flags), one after the other in the same processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    folder = runs[0][0].parent
    if not (folder / "documents.idx").exists():
        write_documents(folder / "documents")
    common = [*MODEL, *TRAINING, "--data-path", str(folder / "documents")]
    description = [{"record": str(record), "flags": [*common, *flags.split()]} for record, flags in runs]
    (folder / "runs.json").write_text(json.dumps(description))
    script = [str(Path(__file__).with_name("recorded_pretrain.py")), str(folder / "runs.json")]
    return subprocess.run(
        [sys.executable, *launcher, *script], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def steps(record: Path) -> dict[int, dict[str, float]]:
    """Loss and gradient norm of every iteration of a run."""
    return {int(iteration): values for iteration, values in json.loads(record.read_text()).items()}


def train(folder: Path, flags: str, processes: int = 1) -> dict[int, dict[str, float]]:
    """Loss and gradient norm of every iteration of a run."""
    record = folder / "record.json"
    record.unlink(missing_ok=True)
    done = launch([(record, flags)], processes)
    assert done.returncode == 0, done.stderr[-6000:]
    return steps(record)


def assert_same(actual: dict, expected: dict, iterations: range, tolerance: float) -> None:
    assert sorted(actual) == list(iterations)
    for iteration in iterations:
        for name, value in expected[iteration].items():
            assert actual[iteration][name] == pytest.approx(value, rel=tolerance), (iteration, name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint that every layout starts from."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, f"--train-iters 1 --save {folder}/checkpoint --save-interval 1")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Callable[[int, str, str], dict]:
    """Five steps from the checkpoint for a case of CASES -> the record.

    All cases of one number of processes are trained when the first of them is asked for.
    """
    folder = tmp_path_factory.mktemp("layouts")
    outcome: dict[int, subprocess.CompletedProcess] = {}
    records = {case: folder / f"{number}.json" for number, case in enumerate(CASES)}

    def run(*case) -> dict:
        processes = case[0]
        if processes not in outcome:
            runs = [
                (record, f"--train-iters 5 --load {checkpoint} --finetune {layout} {documents}")
                for (size, layout, documents), record in records.items() if size == processes
            ]  # fmt: skip
            outcome[processes] = launch(runs, processes)
        assert records[case].exists(), outcome[processes].stderr[-6000:]
        return steps(records[case])

    return run


@pytest.mark.parametrize(("processes", "layout", "documents"), [case for case in CASES if case[1]])
def test_every_layout_trains_as_one_process(processes, layout, documents, trained):
    assert_same(trained(processes, layout, documents), trained(1, "", documents), range(1, 6), TOLERANCE)


def test_documents_change_the_numbers(trained):
    """Otherwise the packed runs above compare nothing."""
    assert trained(1, "", "")[1]["loss"] != pytest.approx(trained(1, "", PACKED)[1]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_resume_equals_the_uninterrupted_run(optimizer, tmp_path):
    save = f"--save {tmp_path}/checkpoint --save-interval 3 {optimizer}"
    whole = train(tmp_path, f"--train-iters 6 {save}", processes=2)
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = train(tmp_path, f"--train-iters 6 --load {tmp_path}/checkpoint {optimizer}", processes=2)
    assert_same(resumed, whole, range(4, 7), 1e-7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ksa-window-chunks 3", "--ksa-window-chunks: the checkpoint was written with 2, the flags say 3"),
        ("--harpe-base-max 2e5", "--harpe-bases: the checkpoint was written with 10000,100000, the flags say 10000,200000"),
    ],
)
def test_other_settings_than_the_checkpoint_are_refused(flags, message, checkpoint, tmp_path):
    done = launch([(tmp_path / "record.json", f"--train-iters 5 --load {checkpoint} {flags}")], processes=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "exitcode  : 2" in done.stderr  # the launcher's own report of what its child returned
    assert not (tmp_path / "record.json").exists()
