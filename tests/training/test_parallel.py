"""The trainer in one, two and four processes, and resumed: the numbers of the undisturbed single process."""

import subprocess
from pathlib import Path

import pytest
from trainer import assert_same, launch, selected, steps

pytestmark = pytest.mark.slow
PACKED = "--reset-position-ids --reset-attention-mask"
TOLERANCE = 1e-5
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
TP, SP, PP = "--tensor-model-parallel-size 2", "--sequence-parallel", "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP} --num-virtual-stages-per-pipeline-rank 2"
CP, CP_4 = "--context-parallel-size 2", "--context-parallel-size 4"
OPTIMIZER = "--use-distributed-optimizer"
REDUCE = "--overlap-grad-reduce"
OVERLAP = f"{OPTIMIZER} {REDUCE} --overlap-param-gather"
# Each parameter is gathered by itself: one that is read without Megatron's hooks on calls of its module is stale.
ALONE = "--ddp-bucket-size 1"
ASYNC = "--async-save"
# Of the 64 tokens of a micro-batch; not a divisor of any rank's share.
CHUNKS = "--loss-chunk-rows 20"
EITHER = ("", PACKED)
# Micro-batches of an iteration: two gradients are summed; four where stages or data-parallel ranks share them.
TWO, FOUR = "--global-batch-size 2", "--global-batch-size 4"
# Processes, flags of a layout, and the documents to train it on.
LAYOUTS = [
    (1, RECOMPUTE, [PACKED]),
    (1, CHUNKS, EITHER),
    (2, OPTIMIZER, [PACKED]),
    (2, f"{OVERLAP} {ALONE} {CHUNKS}", [PACKED]),
    (2, TP, [""]),
    (2, f"{TP} {SP} {RECOMPUTE}", [""]),
    (2, f"{PP} {RECOMPUTE}", [""]),
    (2, f"{TP} {CHUNKS}", [""]),
    (2, f"{CP} {CHUNKS}", [PACKED]),
    (2, INTERLEAVED, [PACKED]),
    (2, f"{CP} {RECOMPUTE}", [PACKED]),
    (2, f"{CP} {SELECTIVE}", [""]),
    (2, f"{CP} --cp-comm-type a2a", [PACKED]),
    (4, CP_4, [PACKED]),
    (4, f"{TP} {SP} {CP} {RECOMPUTE}", [PACKED]),
    (4, f"{PP} {CP} {OPTIMIZER}", [PACKED]),
    (4, f"{TP} {SP} {PP} {OVERLAP} {CHUNKS}", [PACKED]),
]
# With `-m long` alone: layouts that run above with recompute, chunks of the loss, other documents or further kinds.
LONG_LAYOUTS = [
    (2, f"{TP} {SP}", EITHER),
    (2, PP, EITHER),
    (2, CP, EITHER),
    (4, f"{TP} {SP} {CP}", [PACKED]),
    (4, f"{TP} {SP} {CP} {RECOMPUTE}", [""]),
    (4, CP_4, [""]),
    (4, f"{TP} {PP} {OVERLAP}", [PACKED]),
]
# Iterations: the gradient, and a first and a second update.
ITERATIONS = 3
# Processes, and the layouts before and after a checkpoint.
ANY_LAYOUT = f"{OPTIMIZER} --ckpt-fully-parallel-save --dist-ckpt-optim-fully-reshardable"
RESUMES = [
    (2, "", ""),
    # Buckets of which one rank holds padding alone: saving them ended in an assertion.
    (2, f"{OPTIMIZER} {ASYNC} {REDUCE} {ALONE}", f"{OPTIMIZER} {ASYNC} {REDUCE} {ALONE}"),
    (4, f"{TP} {SP} {CP}", f"{PP} {CP}"),
    # Padded buckets: what was saved of a parameter was shifted by the padding before it.
    (4, f"{CP_4} {ANY_LAYOUT} {REDUCE} {ALONE}", f"{TP} {PP} {ANY_LAYOUT}"),
]
REFERENCES = [(1, batch, documents) for batch in (TWO, FOUR) for documents in EITHER]


def batch(layout: str) -> str:
    """The flag of a layout's batch."""
    return FOUR if PP in layout or OPTIMIZER in layout else TWO


def cases(layouts: list[tuple]) -> list[tuple]:
    return [case for size, layout, either in layouts for documents in either if (case := (size, layout, documents))[1]]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> "Runs":
    return Runs(tmp_path_factory.mktemp("layouts"), selected(request, "case"), selected(request, "resume"))


class Runs:
    """The runs of the selected tests; those of one number of processes are made when the first of them is asked for.

    A single process makes the checkpoint that every layout starts from, and the runs that layouts are compared with.
    """

    def __init__(self, folder: Path, layouts: list[tuple], resumes: list[tuple]) -> None:
        self.checkpoint, self.outcome = folder / "checkpoint", {}
        runs = {(1, "start"): f"--train-iters 1 --save {self.checkpoint} --save-interval 1"}
        train = f"--train-iters {ITERATIONS} --load {self.checkpoint} --finetune"
        runs |= {case: f"{train} {batch(case[1])} {case[1]} {case[2]}" for case in [*layouts, *REFERENCES]}
        for number, (size, before, after) in enumerate(resumes):
            saved = folder / f"checkpoint{number}"
            runs[size, before, after, "whole"] = f"--train-iters 4 {TWO} --save {saved} --save-interval 2 {before}"
            runs[size, before, after, "resumed"] = f"--train-iters 4 {TWO} --load {saved} --ckpt-step 2 {after}"
        self.runs = {run: (folder / f"{number}.json", flags) for number, (run, flags) in enumerate(runs.items())}

    def make(self, processes: int) -> subprocess.CompletedProcess:
        """The outcome of the runs of so many processes."""
        if processes not in self.outcome:
            if processes > 1:
                self.make(1)
            same_size = [self.runs[run] for run in self.runs if run[0] == processes]
            self.outcome[processes] = launch(same_size, processes)
        return self.outcome[processes]

    def __call__(self, run: tuple) -> dict[int, dict[str, float]]:
        """The record of a run: ITERATIONS from the checkpoint for a layout and its documents; four iterations that save
        half-way for (*resume, "whole") and the last two of them again for (*resume, "resumed"), resume of RESUMES.
        """
        done, (record, _) = self.make(run[0]), self.runs[run]
        assert record.exists(), done.stderr[-6000:]
        return steps(record)


@pytest.mark.parametrize(
    "case", [*cases(LAYOUTS), *(pytest.param(case, marks=pytest.mark.long) for case in cases(LONG_LAYOUTS))], ids=str
)
def test_every_layout_trains_as_one_process(case, trained):
    assert_same(trained(case), trained((1, batch(case[1]), case[2])), range(1, ITERATIONS + 1), TOLERANCE)


def test_documents_change_the_numbers(trained):
    """Otherwise the packed runs above compare nothing."""
    assert trained((1, TWO, ""))[1]["loss"] != pytest.approx(trained((1, TWO, PACKED))[1]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("resume", RESUMES, ids=str)
def test_resume_equals_the_uninterrupted_run(resume, trained):
    tolerance = 1e-7 if resume[1] == resume[2] else TOLERANCE
    assert_same(trained((*resume, "resumed")), trained((*resume, "whole")), range(3, 5), tolerance)


@pytest.mark.parametrize("resume", RESUMES[1:2], ids=str)
def test_a_save_in_the_background_is_one(resume, trained):
    """Megatron turns `--async-save` off, with a warning, where it does not like its other flags."""
    trained((*resume, "whole"))
    assert "scheduled an async checkpoint save at iteration       2" in trained.make(2).stdout


def test_other_settings_than_the_checkpoint_are_refused(trained, tmp_path):
    trained.make(1)
    flags = f"--train-iters {ITERATIONS} --load {trained.checkpoint} --ksa-window-chunks 3"
    done = launch([(tmp_path / "record.json", flags)], processes=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--ksa-window-chunks: the checkpoint was written with 2, the flags say 3" in errors[0]
    assert done.returncode == 2
    assert not (tmp_path / "record.json").exists()
