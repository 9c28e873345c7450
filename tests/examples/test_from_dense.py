"""The chain from a dense model on a tiny Qwen 3 with random weights: killed once in each stage, same final bytes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from warm import Started, run_script

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "ksa_from_dense" / "run.py"
FORKS = Path(__file__).with_name("chain_in_forks.py")
VOCABULARY, STEPS = 128, 4
LIMIT = 600


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with the dense model and the data."""
    folder = tmp_path_factory.mktemp("from_dense")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(str(folder / "data"), VOCABULARY) as writer:
        for length in random.integers(100, 300, 50):
            writer.add_document(random.integers(0, VOCABULARY - 1, length))
    return folder


def command(source: Path, work: Path, *more: str) -> list[str]:
    flags = f"""
        --input {source}/qwen3 --data-path {source}/data --validation {source}/data --work {work} --lengths 64 128
        --distil-at first --distil-steps {STEPS} --anneal-steps {STEPS} --extend-steps 0 {STEPS} --distil-batch 2
        --anneal-batch 2 --extend-batch 2 --distil-lr 1e-2 --anneal-lr 1e-3 --extend-lr 1e-3 --window-chunks 1
        --chunk-size 4 --dtype float32 --save-interval 1 --evaluation-windows 2"""
    return [sys.executable, str(SCRIPT), *flags.split(), *more]


def start(source: Path, work: Path, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("a") as out:
        return subprocess.Popen(command(source, work), stdout=out, stderr=out, env=environment, start_new_session=True)


def wait_for_killed(work: Path) -> None:
    """Until the last process of a killed chain has ended and let go of the lock: the first may be gone earlier."""
    if (work / ".lock").exists():
        with (work / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_killed_in_each_stage_it_ends_in_the_same_bytes(source, tmp_path):
    # The undisturbed chain runs beside the one that is killed.
    whole = start(source, tmp_path / "whole", tmp_path / "whole.log")
    work, log = tmp_path / "killed", tmp_path / "killed.log"
    trainings = ["01-64-distil", "02-64-anneal", "03-128-extend"]
    reached = {name: lambda name=name: _iterations(work / name) in range(1, STEPS) for name in trainings}
    # The import and the exports are too short to be met: their folder beside the place is there while they write.
    reached |= {
        "import": lambda: (work / ".dense.partial").exists(),
        "export": lambda: (work / ".03-128-extend-hf.partial").exists(),
    }
    kills = ["import", *trainings, "export"]
    for kill in kills:
        chain = start(source, work, log)
        deadline = time.monotonic() + LIMIT
        while not reached[kill]() and chain.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.01)
        assert chain.poll() is None, (kill, log.read_text()[-4000:])
        os.killpg(chain.pid, signal.SIGKILL)
        chain.wait()
        wait_for_killed(work)
    chain = start(source, work, log)
    assert chain.wait(LIMIT) == 0, log.read_text()[-4000:]
    assert whole.wait(LIMIT) == 0, (tmp_path / "whole.log").read_text()[-4000:]
    for name in trainings:
        ours, theirs = (load_file(folder / f"{name}-hf" / "model.safetensors") for folder in (work, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        losses = [json.loads((folder / f"{name}-perplexity.json").read_text()) for folder in (work, tmp_path / "whole")]
        # Each names its own checkpoint.
        assert [each["settings"].pop("checkpoint") for each in losses] and losses[0] == losses[1]
    assert not [path for path in work.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    config = json.loads((work / "03-128-extend-hf" / "config.json").read_text())
    assert config["mix_coeff"] == 0.0 and config["summary_layer_freq"] == [1, 1, 1, 0]
    assert config["max_position_embeddings"] == 128
    other = subprocess.run(
        [*command(source, work), "--min-lr", "1e-9"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    refused(other, "was begun with flags")


def forked_chain(source: Path, work: Path, log: Path, name: str = "-", count: int = 1) -> int:
    """The exit code of a chain of two steps a stage without evaluations, killed where `chain_in_forks.py` says."""
    flags = command(source, work, "--distil-steps", "2", "--anneal-steps", "2", "--extend-steps", "0", "2")[2:]
    validation = flags.index("--validation")
    del flags[validation : validation + 2]
    wait_for_killed(work)
    return Started(FORKS, name, count, *flags, log=log, environment={**os.environ, "OMP_NUM_THREADS": "1"}).wait(LIMIT)


def test_killed_in_each_stage_by_forks(source, tmp_path):
    """As the test above, in the default suite: of a stage's two checkpoints the second has no tracker yet."""
    work, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    assert forked_chain(source, whole, tmp_path / "whole.log") == 0, (tmp_path / "whole.log").read_text()[-4000:]
    trainings = ["01-64-distil", "02-64-anneal", "03-128-extend"]
    kills = [("dense", 1), *((f"{name}/latest_checkpointed_iteration.txt", 2) for name in trainings)]
    for name, count in [*kills, ("03-128-extend-hf", 1)]:
        assert forked_chain(source, work, log, name, count) == -signal.SIGKILL, (name, log.read_text()[-4000:])
        assert (work / name).exists() == (count == 2), name
    assert [_iterations(work / name) for name in trainings] == [2, 2, 2]
    assert forked_chain(source, work, log) == 0, log.read_text()[-4000:]
    for name in trainings:
        ours, theirs = ((folder / f"{name}-hf" / "model.safetensors").read_bytes() for folder in (work, whole))
        assert ours == theirs, name
    assert not [path for path in work.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def _iterations(folder: Path) -> int:
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def test_dry_run_prints_every_command(source, tmp_path):
    flags = "--distil-at every --dry-run -- --tensor-model-parallel-size 2".split()
    done = run_script(*command(source, tmp_path / "work", *flags)[1:])
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [next(word.split("/")[-1] for word in line.split() if word.endswith(".py")) for line in commands] == [
        "convert_checkpoint.py", *["pretrain_gpt.py", "convert_checkpoint.py", "perplexity.py"] * 5
    ]  # fmt: skip
    trained = [line for line in commands if "pretrain_gpt.py" in line]
    assert ["--ksa-distill" in line for line in trained] == [True, False, True, False, False]
    assert ["--ksa-initial-coefficient 1" in line for line in trained] == [False, False, True, False, False]
    assert all(line.endswith("--finetune --tensor-model-parallel-size 2") for line in trained)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "128", "64"], "--lengths 128 64: positive, the shortest first"),
        (["--lengths", "66", "128"], "--seq-length 66 is not a multiple of 4"),
        (["--anneal-steps", "1", "2", "3"], "--anneal-steps has 3 values for 2 lengths"),
        (["--layer-pattern", "kkk"], "describes 3 layers, the model has 4"),
        (["--input", "/nowhere"], "--input /nowhere is no folder"),
        (["--layer-pattern", "wwwf"], "--layer-pattern wwwf has no layer with summaries"),
        (["--launcher", "'"], "is no command: No closing quotation"),
        (["--launcher", " "], "is no command: leave it out"),
        (["--extend-lr", "nan"], "--extend-lr nan: a number of at least 0 is needed"),
        (["--decay", "-1"], "--decay -1: a number of at least 0"),
        (["--extend-batch", "3", "--micro-batch", "2"], "--extend-batch 3: a multiple of --micro-batch 2 is needed"),
        (["--evaluation-windows", "0"], "--evaluation-windows 0: at least 1"),
        (["--seed", "4294967296"], "--seed 4294967296: at most 4294967295"),
        (["--work", ""], "the name of a folder is needed"),
    ],
)
def test_bad_input(flags, message, source, tmp_path):
    """Rates, batches and windows of a later stage were refused there, after the stages before it; launchers' quotes
    ended in a traceback."""
    done = run_script(*command(source, tmp_path / "work", *flags, "--dry-run")[1:])
    refused(done, message)


def refused(done, message: str) -> None:
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path {}/nothing", "nothing.idx does not exist"),
        ("--data-path 0.5 {}/data 0.5", "--data-path, word 1: 0.5 stands alone"),
        ("--validation {}/nothing", "--validation: --data-path {}/nothing: {}/nothing.idx does not exist"),
        ("--lengths 64 65536", "tokens are too few for windows of 65,536"),
        ("--work {}/data.bin", "--work {}/data.bin is no folder to write in: File exists"),
        ("--work {}/data.bin/below", "is no folder to write in: Not a directory"),
        ("--launcher no-such-program", "--launcher no-such-program: there is no program no-such-program"),
    ],
)
def test_refused_before_the_first_stage(flags, message, source, tmp_path):
    """Missing validation data were found after a whole stage, and a --work or --launcher that cannot be used ended in
    a traceback."""
    words = flags.replace("{}", str(source)).split()
    refused(run_script(*command(source, tmp_path / "work", *words)[1:]), message.replace("{}", str(source)))
    assert not (tmp_path / "work" / "dense").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--save elsewhere", "--save after -- would be given to every stage, and the chain decides it: use --work"),
        ("--train-iters=3", "use --extend-steps"),
        ("--finetune", "drop it"),
    ],
)
def test_flags_that_the_chain_decides(flags, message, source, tmp_path):
    """With --save or --train-iters after -- the chain never saw a stage as done, and asked to be started again."""
    refused(run_script(*command(source, tmp_path, "--dry-run", "--", *flags.split())[1:]), message)


@pytest.mark.parametrize(
    ("content", "message"), [("[1", "plan.json cannot be read as JSON"), ('{"a": 1}', "does not hold the settings")]
)
def test_a_damaged_plan(content, message, source, tmp_path):
    """A plan.json that is no JSON ended in a traceback."""
    (tmp_path / "plan.json").write_text(content)
    refused(run_script(*command(source, tmp_path)[1:]), message)


def test_another_model_in_a_begun_folder(source, tmp_path):
    """Another --input was ignored, since the import of the first was there."""
    (tmp_path / "plan.json").write_text(json.dumps({"dense": {"input": "/models/other"}}))
    refused(run_script(*command(source, tmp_path)[1:]), "was begun with input /models/other for the stage dense")


def test_annealing_of_what_is_annealed_starts_again(source, tmp_path):
    """An annealing stage after another, without distillation between them, was refused when its turn came."""
    flags = "--distil-at every --distil-steps 4 0 --anneal-steps 4 4 --dry-run".split()
    done = run_script(*command(source, tmp_path / "work", *flags)[1:])
    trained = [line for line in done.stdout.splitlines() if "pretrain_gpt.py" in line]
    kinds = ["-anneal " in line and "--ksa-initial-coefficient 1" in line for line in trained]
    assert kinds == [False, False, True, False], done.stdout
