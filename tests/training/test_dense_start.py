"""The trainer from a dense checkpoint to a KSA model and back, in several layouts.

With a window over the whole sequence no text row depends on a summary: the KSA model's first loss is the dense model's.
"""

import pytest
from trainer import launch, steps

pytestmark = pytest.mark.slow
DENSE = "--no-ksa --train-iters 2"
# Annealed to 0 from the second iteration on.
WINDOW = "--ksa-window-chunks 8 --train-iters 2"
WHOLE_WINDOW = f"{WINDOW} --ksa-anneal-start 0 --ksa-anneal-end 2"
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the records of single-process runs, and what the last one, which is refused, said."""
    folder = tmp_path_factory.mktemp("dense")
    dense, ksa = (f"--finetune --load {folder}/{name}" for name in ("dense", "ksa"))
    flags = {
        "start": f"{DENSE} --save {folder}/dense --save-interval 2",
        "dense": f"{DENSE} {dense}",
        "ksa": f"{WHOLE_WINDOW} {dense} --save {folder}/ksa --save-interval 1",
        "ksa again": f"{WINDOW} {ksa}",
        "dense again": f"{DENSE} {ksa}",
        "not annealed": f"{DENSE} {ksa} --ckpt-step 1",
    }
    return folder, launch([(folder / f"{name}.json", more) for name, more in flags.items()], processes=1)


def first(folder, name):
    assert (folder / f"{name}.json").exists(), name
    return steps(folder / f"{name}.json")[1]


def test_ksa_model_starts_as_the_dense_one_and_returns(runs):
    folder, done = runs
    for name, expected in (("ksa", "dense"), ("dense again", "ksa again")):
        for value in ("loss", "grad_norm"):
            actual = first(folder, name)[value]
            assert actual == pytest.approx(first(folder, expected)[value], rel=TOLERANCE), (name, value, done.stderr)


def test_other_layouts_read_the_dense_checkpoint(runs, tmp_path):
    folder, _ = runs
    layouts = {
        "tensor": "--tensor-model-parallel-size 2 --sequence-parallel",
        "pipeline": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "context": "--context-parallel-size 2 --ksa-independent-layernorm --ksa-independent-qk-norm",
    }
    start = f"{WHOLE_WINDOW} --load {folder}/dense"
    described = [(tmp_path / f"{name}.json", f"{start} --finetune {layout}") for name, layout in layouts.items()]
    done = launch([*described, (tmp_path / "refused.json", start)], processes=2)
    for name in layouts:
        assert first(tmp_path, name)["loss"] == pytest.approx(first(folder, "dense")["loss"], rel=TOLERANCE), name
    assert "written without --ksa, the flags say with: add --finetune" in errors(done)


def test_summaries_in_use_are_not_dropped(runs):
    folder, done = runs
    assert "iteration 1 still uses its summary projections, with a weight of 0.5" in errors(done)
    assert not (folder / "not annealed.json").exists()


def errors(done):
    """The one line on stderr of a run that was refused."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    return line
