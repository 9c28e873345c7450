"""The trainer in one, two and four processes, and resumed: the numbers of the undisturbed single process."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer import assert_same, launch, steps, train

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
