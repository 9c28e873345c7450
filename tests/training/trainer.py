"""The trainer on a tiny model of every layer kind, in processes of its own; its losses and gradient norms."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# tests/warm.py, also for scripts that pytest does not start.
sys.path.append(str(Path(__file__).parents[1]))
import warm as warm_processes  # noqa: E402

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.platform.ranks import run_ranks

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm --qk-layernorm --swiglu "
    "--disable-bias-linear --hidden-dropout 0 --untie-embeddings-and-output-weights "
    "--ksa --ksa-layer-pattern kwlf --ksa-window-chunks 2 "
    "--position-embedding-type harpe --harpe-base-min 1e4 --harpe-base-max 1e5"
).split()
# 64 x 2 words are no padding at tensor-parallel sizes 1 and 2: a different padding is a different softmax.
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 4 --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 64 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --log-interval 1 "
    "--eval-iters 0 --ckpt-format torch_dist"
).split()
END_OF_DOCUMENT = 126
# Ranks have imported everything after so long; where one writes its stacks, the others have so long for theirs.
START_SECONDS, STACKS_SECONDS = 120, 3


def write_documents(prefix: Path) -> None:
    """A dataset of documents of 2 to 60 tokens: several in a sequence."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), 127) as writer:
        for length in random.integers(1, 60, 200):
            writer.add_document(np.append(random.integers(0, END_OF_DOCUMENT, length), END_OF_DOCUMENT))


def launch(
    runs: list[tuple[Path, str]], processes: int, entry: str = "recorded_pretrain.py", limit: float | None = None,
    seconds: float = math.inf,
) -> warm_processes.Done | subprocess.CompletedProcess:  # fmt: skip
    """Train once for each (record, flags), one after the other in the same processes.

    The ranks are forks that have Megatron imported; with a limit, and where there are GPUs, torchrun starts them.

    Args:
        limit: seconds of a run after which each rank writes its stacks to stacksRANK.txt beside the first record, and
            is ended.
        seconds: with a limit, after which all runs are ended.
    """
    folder = runs[0][0].parent
    if not (folder / "documents.idx").exists():
        write_documents(folder / "documents")
    common = [*MODEL, *TRAINING, "--data-path", str(folder / "documents")]
    description = [{"record": str(record), "flags": [*common, *flags.split()]} for record, flags in runs]
    (folder / "runs.json").write_text(json.dumps(description))
    script = [str(Path(__file__).with_name(entry)), str(folder / "runs.json"), *([] if limit is None else [str(limit)])]
    if limit is None and not torch.cuda.is_available():
        return warm_processes.run_script(*script, ranks=processes)
    stacks = [folder / f"stacks{rank}.txt" for rank in range(processes)]
    for path in stacks:
        path.unlink(missing_ok=True)
    hung_for = [0]

    def hung() -> bool:
        """Whether stacks have stood there for some seconds, in which the other ranks write theirs."""
        hung_for[0] += any(path.exists() and path.stat().st_size for path in stacks)
        return hung_for[0] > STACKS_SECONDS

    if limit is not None:
        seconds = min(seconds, len(runs) * limit + START_SECONDS)
    return run_ranks(script, processes, seconds=seconds, ended=hung)


def selected(request: pytest.FixtureRequest, name: str) -> list:
    """Values of the parameter `name` in the tests of the requesting module that this session runs, each of them once.

    A fixture that makes the runs of a whole module makes no run of a test that `-m` or `-k` leaves out.
    """
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(test.callspec.params[name] for test in tests if name in test.callspec.params))


def steps(record: Path) -> dict[int, dict[str, float]]:
    """Loss and gradient norm of every iteration of a run."""
    return {int(iteration): values for iteration, values in json.loads(record.read_text()).items()}


def assert_same(actual: dict, expected: dict, iterations: range, tolerance: float) -> None:
    assert sorted(actual) == list(iterations)
    for iteration in iterations:
        for name, value in expected[iteration].items():
            assert actual[iteration][name] == pytest.approx(value, rel=tolerance), (iteration, name)
