"""Extend a dense checkpoint to a longer context with HARPE in one stage, or by one of the baselines: one flag apart.

harpe        one stage at the target length, a base for each KV group (--harpe-bases, or the uniform set)
single-base  one stage at the target length, one raised base
multi-stage  the raised base, lengths doubled (--stage-factor) up to the target, the same tokens in all

Every stage is a run of pretrain_gpt.py, shown first. A stage that is done is not run again; one that was interrupted
goes on from its last checkpoint.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
import installed  # noqa: F401

from megatron_ksa.errors import UsageError, usage_errors_exit

METHODS = ("harpe", "single-base", "multi-stage")
# What a checkpoint's arguments say about the model, as flags: name -> flag that takes the value.
VALUES = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "kv_channels": "--kv-channels",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "rotary_percent": "--rotary-percent",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by",
    "init_method_std": "--init-method-std",
}
SWITCHES = {
    "qk_layernorm": "--qk-layernorm",
    "swiglu": "--swiglu",
    "add_qkv_bias": "--add-qkv-bias",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "rotary_interleaved": "--rotary-interleaved",
}
TOKENIZER = {"tokenizer_type": "--tokenizer-type", "tokenizer_model": "--tokenizer-model", "vocab_size": "--vocab-size"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, type=Path, help="dense checkpoint: folder that --save wrote")
    parser.add_argument("--save", required=True, type=Path, help="folder of this run; a folder for each stage in it")
    parser.add_argument("--data-path", required=True, nargs="+", help="dataset or blend, as pretrain_gpt.py takes it; "
                        "tools/upsample_lengths.py makes length-upsampled ones")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="harpe", help="how to extend (harpe)")
    parser.add_argument("--length", required=True, type=int, help="target length, tokens")
    parser.add_argument(
        "--steps", required=True, type=int, help="iterations at the target length: the tokens of every method"
    )
    parser.add_argument(
        "--global-batch-size", type=int, default=64, help="sequences of the target length an iteration (64)"
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=1, help="sequences of the target length a forward pass (1)"
    )
    parser.add_argument("--lr", type=float, default=2e-5, help="constant learning rate after the warm-up (2e-5)")
    parser.add_argument("--warmup", type=int, default=0, help="iterations of linear warm-up in every stage (0)")
    parser.add_argument("--harpe-bases", help="bases of method harpe: list, file or preset, one for each KV group")
    parser.add_argument("--harpe-base-min", type=float, default=1e6, help="smallest base of the uniform set (1e6)")
    parser.add_argument("--harpe-base-max", type=float, default=5e6, help="largest base of the uniform set (5e6)")
    parser.add_argument(
        "--harpe-order", choices=("ascending", "descending"), default="ascending", help="of the uniform set"
    )
    parser.add_argument(
        "--rotary-base", type=int, default=5_000_000, help="the raised base of both baselines (5000000)"
    )
    parser.add_argument("--stage-factor", type=int, default=2, help="length of a stage over the one before it (2)")
    parser.add_argument("--save-interval", type=int, default=500, help="iterations between checkpoints (500)")
    parser.add_argument("--seed", type=int, default=1234, help="of the data order (1234)")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes, one a GPU (1)")
    parser.add_argument("trainer", nargs="*", help="after --: more flags for pretrain_gpt.py, such as parallel sizes")
    return parser.parse_args()


def model_flags(stored: argparse.Namespace) -> list[str]:
    """Flags of `pretrain_gpt.py` for the model and tokenizer that a checkpoint's arguments describe.

    Raises:
        UsageError: a checkpoint with summary rows: extension starts from a dense model.
    """
    if getattr(stored, "ksa", False):
        raise UsageError("--load: this is a KSA checkpoint; extension starts from a dense one")
    if stored.position_embedding_type not in ("rope", "harpe"):
        raise UsageError(f"--load: the model's positions are {stored.position_embedding_type}; rope or harpe is needed")
    known = vars(stored)
    flags = [word for name, flag in {**VALUES, **TOKENIZER}.items() if known.get(name) is not None
             for word in (flag, str(known[name]))]  # fmt: skip
    flags += [flag for name, flag in SWITCHES.items() if known.get(name)]
    if not stored.add_bias_linear:
        flags.append("--disable-bias-linear")
    if stored.group_query_attention:
        flags += ["--group-query-attention", "--num-query-groups", str(stored.num_query_groups)]
    return [*flags, "--hidden-dropout", "0", "--attention-dropout", "0"]


def stage_lengths(start: int, target: int, factor: int) -> list[int]:
    """Lengths of the stages of the multi-stage baseline: start * factor, ... , target.

    Raises:
        UsageError: a factor below 2, or a target that is no extension.
    """
    if factor < 2:
        raise UsageError(f"--stage-factor {factor}: at least 2")
    if target <= start:
        raise UsageError(f"--length {target}: the checkpoint was trained at {start} already")
    lengths = []
    while start * factor < target:
        start *= factor
        lengths.append(start)
    return [*lengths, target]


def position_flags(args: argparse.Namespace, groups: int) -> list[str]:
    """Rotary flags of the method.

    The single base is given to every KV group, which is RoPE with that base: all methods then run the same attention.
    """
    if args.method != "harpe":
        return ["--position-embedding-type", "harpe", "--harpe-bases", ",".join([str(args.rotary_base)] * groups)]
    if args.harpe_bases:
        # The trainer runs in the repository, a file is named from here.
        path = Path(args.harpe_bases)
        bases = str(path.resolve()) if path.is_file() else args.harpe_bases
        return ["--position-embedding-type", "harpe", "--harpe-bases", bases]
    bounds = ["--harpe-base-min", str(args.harpe_base_min), "--harpe-base-max", str(args.harpe_base_max)]
    return ["--position-embedding-type", "harpe", *bounds, "--harpe-order", args.harpe_order]


def run_stage(
    args: argparse.Namespace, model: list[str], positions: list[str], length: int, steps: int, load: Path, save: Path
) -> None:
    """Train one stage up to `steps` iterations, unless it is done."""
    tracker = save / "latest_checkpointed_iteration.txt"
    done = int(tracker.read_text()) if tracker.exists() else 0
    if done >= steps:
        print(f"{save}: {done} iterations are done")
        return
    times = args.length // length
    source = ["--load", save] if done else ["--load", load, "--finetune", "--harpe-override-checkpoint-bases"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.nproc_per_node]
    command = [
        sys.executable, *(launcher if args.nproc_per_node > 1 else []), "pretrain_gpt.py", *model, *positions,
        "--seq-length", length, "--max-position-embeddings", length,
        "--micro-batch-size", args.micro_batch_size * times,
        "--global-batch-size", args.global_batch_size * times, "--train-iters", steps, "--lr", args.lr,
        "--lr-decay-style", "constant", "--lr-warmup-iters", min(args.warmup, steps - 1), "--adam-beta2", 0.95,
        "--weight-decay", 0.1, "--clip-grad", 1.0, "--seed", args.seed, "--data-path", *args.data_path,
        "--split", "100,0,0", "--data-cache-path", save / "cache", "--eval-iters", 0,
        "--log-interval", max(min(50, steps // 4), 1),
        "--ckpt-format", "torch_dist", *source, "--save", save, "--save-interval", min(args.save_interval, steps),
        *args.trainer,
    ]  # fmt: skip
    command = list(map(str, command))
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise UsageError(
            f"stage {save.name} ended with exit code {code}; the same command goes on from its last checkpoint"
        )


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        for flag in ("length", "steps", "global_batch_size", "micro_batch_size", "nproc_per_node", "save_interval"):
            if getattr(args, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
        from megatron_ksa.platform import prepare_platform

        prepare_platform([])
        from megatron_ksa.checkpoint.load import find_checkpoint

        stored = find_checkpoint(args.load).args
        args.load, args.save = args.load.resolve(), args.save.resolve()
        if all(Path(f"{prefix}.idx").exists() for prefix in args.data_path):
            args.data_path = [str(Path(prefix).resolve()) for prefix in args.data_path]
        model, load = model_flags(stored), args.load
        groups = stored.num_query_groups if stored.group_query_attention else stored.num_attention_heads
        positions = position_flags(args, groups)
        lengths = stage_lengths(stored.seq_length, args.length, args.stage_factor)
        if args.method != "multi-stage":
            lengths = lengths[-1:]
        if any(args.length % length for length in lengths):
            raise UsageError(f"--length {args.length} must be a multiple of every stage's length: {lengths}")
        if args.steps < len(lengths):
            raise UsageError(f"--steps {args.steps}: at least one for each of {len(lengths)} stages")
        for index, length in enumerate(lengths):
            steps = args.steps * (index + 1) // len(lengths) - args.steps * index // len(lengths)
            save = args.save / f"{length}"
            run_stage(args, model, positions, length, steps, load, save)
            load = save
        print(f"extended: {load}")


if __name__ == "__main__":
    main()
