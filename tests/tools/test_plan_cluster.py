"""tools/plan_cluster.py: its flags train, its memory is what the trainer reports, and bad input is one line."""

import re
from pathlib import Path

import pytest
from warm import Done, run_script

ROOT = Path(__file__).parents[2]
# The plan of a GPU has fused norms and attention; the parts of memory that they do not touch are compared.
PARTS = re.compile(r"([0-9.]+) billion parameters.*= ([0-9.]+) parameters, ([0-9.]+) gradients, ([0-9.]+) optimizer")
MODEL = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --kv-channels 64 --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm "
    "--qk-layernorm --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--untie-embeddings-and-output-weights --ksa --ksa-layer-pattern kkkf --ksa-window-chunks 2 "
    "--position-embedding-type rope --vocab-size 8191 --make-vocab-size-divisible-by 128 "
    "--tokenizer-type NullTokenizer --micro-batch-size 1 --global-batch-size 4"
)


def plan(*flags: object) -> Done:
    return run_script("tools/plan_cluster.py", *flags)


@pytest.mark.slow
def test_flags_train_and_memory_is_the_trainers(tmp_path):
    from megatron_ksa.config.ksa import KSAConfig
    from megatron_ksa.cost.memory import fullest_stage
    from megatron_ksa.cost.shapes import ModelShape, TrainingLayout

    model, layout = tmp_path / "model.args", tmp_path / "layout.args"
    model.write_text(MODEL)
    done = plan("--model", model, "--gpus", 2, "--gpus-per-node", 2, "--write", layout)
    assert done.returncode == 0, done.stderr
    assert "KSA: " in done.stdout and "full attention: " in done.stdout
    flags = [word for line in layout.read_text().splitlines() if line[0] != "#" for word in line.split()]
    training = "--mock-data --train-iters 1 --lr 1e-3 --eval-iters 0".split()
    trained = run_script("pretrain_gpt.py", *MODEL.split(), *flags, *training, ranks=2)
    assert trained.returncode == 0, trained.stderr[-3000:]
    reported = [float(number) for number in PARTS.search(trained.stdout + trained.stderr).groups()]
    sizes = {flags[i].removeprefix("--").split("-")[0]: int(flags[i + 1]) for i in range(0, 6, 2)}
    ksa = KSAConfig(enabled=True, layer_pattern="kkkf", window_chunks="2")
    shape = ModelShape(ksa, 4, 256, 512, 4, 2, 64, 8192, qk_norm=True)
    planned = TrainingLayout(
        64, tensor_parallel=sizes["tensor"], context_parallel=sizes["context"], pipeline_parallel=sizes["pipeline"],
        data_parallel=2 // (sizes["tensor"] * sizes["context"] * sizes["pipeline"]), parameter_bytes=4,
    )  # fmt: skip
    memory = fullest_stage(shape, planned)[1]
    expected = [memory.num_parameters, memory.parameters, memory.gradients, memory.optimizer]
    assert reported == [pytest.approx(number / 1e9, abs=6e-4) for number in expected]
    row = next(line for line in done.stdout.splitlines() if line.split()[:1] == [str(sizes["tensor"])])
    assert [int(word) for word in row.split()[:4]] == [*sizes.values(), planned.data_parallel]


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--gpus", 12], "use 8 or 16"),
        (["--gpus", 8, "--memory", 1], "--memory "),
        (["--gpus", 8, "--efficiency", 2], "at most 1"),
        (["--gpus", 8, "--seq-length", 131075], "use 131072 or 131080"),
        (["--gpus", 0], "above 0"),
        (["--gpus", 8, "--model", "no-such-file"], "slurm/models/ksa_70b.args"),
        (["--gpus", 8, "--write", "no-such-folder/layout.args"], "use a folder that exists"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, part):
    written = tmp_path / "layout.args"
    done = plan("--model", "slurm/models/ksa_1b9.args", "--write", written, *flags)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0] and "Traceback" not in done.stderr, done.stderr
    assert not written.exists() and not (ROOT / "no-such-folder").exists()
