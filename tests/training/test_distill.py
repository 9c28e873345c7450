"""Distillation by the trainer: in every layout the numbers of one process, and only summary parameters change."""

from pathlib import Path

import pytest
import torch
from trainer import assert_same, launch, selected, steps

from megatron_ksa.model.summary_parameters import is_summary_parameter

pytestmark = pytest.mark.slow
PACKED = "--reset-position-ids --reset-attention-mask"
TOLERANCE = 1e-5
# Larger weights than by default: summaries must matter, or student and teacher differ by rounding only.
LARGE = "--init-method-std 0.2"
DISTILL = f"--ksa-distill --ksa-distill-cosine-weight 0.5 --ksa-log-attention-share {LARGE}"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
TP, SP, PP = "--tensor-model-parallel-size 2", "--sequence-parallel", "--pipeline-model-parallel-size 2"
PP_4 = "--pipeline-model-parallel-size 4"
INTERLEAVED = f"{PP} --num-virtual-stages-per-pipeline-rank 2"
CP = "--context-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer"
OVERLAP = f"{OPTIMIZER} --overlap-grad-reduce --overlap-param-gather"
# Of the 64 tokens of a micro-batch; not a divisor of any rank's share.
CHUNKS = "--loss-chunk-rows 20"
# What the layouts are compared with: one process, on each kind of documents.
REFERENCES = [(1, "", ""), (1, "", PACKED)]
# Processes, flags of a layout, and the documents.
LAYOUTS = [
    (1, RECOMPUTE, PACKED),
    (2, OPTIMIZER, PACKED),
    (2, f"{TP} {SP} {CHUNKS}", PACKED),
    (2, f"{PP} {CHUNKS}", PACKED),
    (2, f"{CP} {CHUNKS}", PACKED),
]
# With `-m long` alone.
LONG_LAYOUTS = [
    (1, CHUNKS, ""),
    (2, "", PACKED),
    (2, TP, ""),
    (2, f"{TP} {SP} {RECOMPUTE}", ""),
    (2, f"{PP} {RECOMPUTE}", ""),
    (2, INTERLEAVED, PACKED),
    (2, f"{CP} {SELECTIVE}", ""),
    (2, f"{CP} --cp-comm-type a2a", PACKED),
    (4, f"{TP} {SP} {CP} {RECOMPUTE}", ""),
    (4, f"{PP} {CP} {OPTIMIZER}", PACKED),
    (4, f"{TP} {SP} {PP} {OVERLAP} {CHUNKS}", PACKED),
    # The last stage is a full layer alone: nothing there trains.
    (4, PP_4, PACKED),
]
# Of a layout: the gradient, and a first and a second update.
ITERATIONS = 3


@pytest.fixture(scope="module")
def distilled(request, tmp_path_factory) -> "Runs":
    return Runs(tmp_path_factory.mktemp("distill"), selected(request, "case"))


class Runs:
    """The runs of the selected tests; those of one number of processes are made when the first of them is asked for.

    All layouts start from one checkpoint: the summary embedding is drawn, and not alike in all layouts.
    """

    def __init__(self, folder: Path, layouts: list[tuple]) -> None:
        self.folder, self.outcome = folder, {}
        runs = {(1, "dense"): f"--no-ksa --train-iters 1 {LARGE} --save {folder}/dense --save-interval 1"}
        from_dense = f"--load {folder}/dense --finetune {DISTILL}"
        runs[1, "start"] = f"--train-iters 1 {from_dense} --save {folder}/start --save-interval 1"
        start = f"--load {folder}/start --finetune {DISTILL}"
        runs |= {case: f"--train-iters 5 {start} {case[2]}" for case in REFERENCES}
        runs |= {case: f"--train-iters {ITERATIONS} {start} {case[1]} {case[2]}" for case in layouts}
        whole = f"{folder}/distilled"
        logs = f"--tensorboard-dir {folder}/tensorboard"
        runs[1, "whole"] = f"--train-iters 5 {from_dense} --save {whole} --save-interval 2 {logs}"
        for before in (2, 4):
            runs[1, "resumed", before] = f"--train-iters 5 --load {whole} --ckpt-step {before} {DISTILL}"
        self.runs = {run: (folder / f"{number}.json", flags) for number, (run, flags) in enumerate(runs.items())}

    def make(self, processes: int):
        """The outcome of the runs of so many processes."""
        if processes not in self.outcome:
            if processes > 1:
                self.make(1)
            same_size = [self.runs[run] for run in self.runs if run[0] == processes]
            self.outcome[processes] = launch(same_size, processes)
        return self.outcome[processes]

    def __call__(self, run: tuple) -> dict[int, dict[str, float]]:
        done, (record, _) = self.make(run[0]), self.runs[run]
        assert record.exists(), done.stderr[-6000:]
        return steps(record)


@pytest.mark.parametrize(
    "case", [*LAYOUTS, *(pytest.param(case, marks=pytest.mark.long) for case in LONG_LAYOUTS)], ids=str
)
def test_every_layout_distils_as_one_process(case, distilled):
    assert_same(distilled(case), distilled((1, "", case[2])), range(1, ITERATIONS + 1), TOLERANCE)


def test_terms_are_there(distilled):
    record = distilled((1, "", ""))
    for name in ("kl loss", "attention loss", "attention cosine"):
        assert min(step[name] for step in record.values()) > 1e-3, name
    assert 0.01 < record[1]["summary attention share"] < 0.9
    assert record[5]["kl loss"] < record[1]["kl loss"]
    assert record[1]["summary coefficient"] == 1
    assert record[1]["kl loss"] != pytest.approx(distilled((1, "", PACKED))[1]["kl loss"], rel=TOLERANCE)


def test_terms_are_in_the_log_line_and_in_tensorboard(distilled):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = distilled.make(1)
    line = next(line for line in done.stdout.splitlines() if "iteration        5/       5" in line)
    events = EventAccumulator(str(distilled.folder / "tensorboard"))
    events.Reload()
    for name in (
        "lm loss",
        "kl loss",
        "attention loss",
        "attention cosine",
        "summary coefficient",
        "summary attention share",
    ):
        assert f"{name}: " in line, (name, line)
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("before", [2, 4])
def test_resume_equals_the_uninterrupted_run(before, distilled):
    assert_same(distilled((1, "resumed", before)), distilled((1, "whole")), range(before + 1, 6), 1e-7)


def test_only_summary_parameters_change_and_have_optimizer_state(distilled):
    """Bitwise: the shared weights are the dense checkpoint's; moments exist for summary parameters and no others."""
    distilled.make(1)
    dense = tensors(distilled.folder / "dense" / "iter_0000001")
    first, last = (tensors(distilled.folder / "distilled" / f"iter_000000{step}") for step in (2, 4))
    weights = [name for name in last if not name.startswith("optimizer.")]
    moments = [name for name in last if name.startswith("optimizer.state.exp_avg.")]
    changed = {name for name in weights if not torch.equal(first[name], last[name])}
    summary = {name for name in weights if is_summary_parameter(name)}
    assert changed == summary and len(summary) == 3
    assert {name.removeprefix("optimizer.state.exp_avg.") for name in moments} == summary
    for name in set(weights) - summary:
        layer = name.split(".")
        if layer[:2] == ["decoder", "layers"]:
            stacked = dense[".".join([*layer[:2], *layer[3:]])]
            assert torch.equal(last[name], stacked[int(layer[2])]), name
        else:
            assert torch.equal(last[name], dense[name]), name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in metadata.items()
             if hasattr(item, "size")}  # fmt: skip
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
