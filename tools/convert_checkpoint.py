"""Convert checkpoints between the Hugging Face layout (safetensors) and Megatron's distributed format.

import  Llama 2 and 3, Qwen 2, 2.5 and 3, released KSA models and this project's exports become a checkpoint that
        pretrain_gpt.py loads at any parallel layout: --load OUTPUT --use-checkpoint-args.
export  A checkpoint of pretrain_gpt.py --save, whatever its layout, becomes a folder for the transformers library.
        KSA and HARPE models bring their modelling code: load them with trust_remote_code=True.

Memory is that of the largest shard and one layer. The output folder appears when it is complete.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.files import whole_folder
from megatron_ksa.locks import exclusive
from megatron_ksa.platform import prepare_platform


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("import", help="Hugging Face -> Megatron")
    to_megatron.add_argument("--input", required=True, type=Path, help="folder with config.json and safetensors shards")
    to_megatron.add_argument("--output", required=True, type=Path, help="folder for pretrain_gpt.py --load")
    to_megatron.add_argument("--seq-length", type=int, help="sequence length to store (the model's positions)")
    to_huggingface = commands.add_parser("export", help="Megatron -> Hugging Face")
    to_huggingface.add_argument("--input", required=True, type=Path, help="folder that pretrain_gpt.py --save wrote")
    to_huggingface.add_argument("--output", required=True, type=Path, help="folder for from_pretrained")
    to_huggingface.add_argument("--iteration", type=int, help="iteration to export; the newest without it")
    to_huggingface.add_argument("--like", type=Path, help="Hugging Face folder to copy tokenizer and token ids from")
    to_huggingface.add_argument("--vocab-size", type=int, help="tokens to keep (all, with Megatron's padding)")
    to_huggingface.add_argument(
        "--format", choices=("transformers", "released"), default="transformers",
        help="released: a KSA model for its authors' modelling code (modeling_qwen3sa.py, copied from --like)",
    )  # fmt: skip
    to_huggingface.add_argument("--shard-gigabytes", type=float, default=5.0, help="largest shard to write (5)")
    to_huggingface.add_argument(
        "--trust-checkpoint", action="store_true", help="load objects of any class, which can run code"
    )
    parser.set_defaults(trust_checkpoint=False)
    return parser.parse_args()


def run_import(args: argparse.Namespace, output: Path) -> str:
    """Import into the empty folder `output`; return what to say at the end."""
    from megatron_ksa.huggingface.importer import import_checkpoint
    from megatron_ksa.huggingface.training_flags import training_flags
    from megatron_ksa.huggingface.weight_files import weight_files

    shards, left_out = weight_files(args.input)
    if left_out:
        names = f"{shards[0].name}{' and the shards after it' if len(shards) > 1 else ''}"
        print(f"{args.input}: read is {names}, as the transformers library does; left out: {', '.join(left_out)}")
    arch = import_checkpoint(args.input, output, args.seq_length)
    flags = shlex.join(training_flags(arch))
    return f"load with: --load {args.output} --use-checkpoint-args, which stands for\n{flags}"


def run_export(args: argparse.Namespace, output: Path) -> str:
    """Export into the empty folder `output`; return what to say at the end."""
    from megatron_ksa.checkpoint.load import find_checkpoint
    from megatron_ksa.huggingface.companions import companion_files
    from megatron_ksa.huggingface.config_json import OWN_MODEL_TYPE, family
    from megatron_ksa.huggingface.exporter import export_checkpoint

    stored = find_checkpoint(args.input, args.iteration)
    released = args.format == "released"
    names = ", ".join(file.name for file in companion_files(args.like)) if args.like is not None else ""
    copied = "" if args.like is None else f"; copied from {args.like}: {names or 'nothing, it has no tokenizer files'}"
    arch = export_checkpoint(
        stored, output, like=args.like, vocab_size=args.vocab_size, released=released,
        max_shard_bytes=int(args.shard_gigabytes * 1e9),
    )  # fmt: skip
    if released:
        return f"a qwen3 model with summary attention: its code, modeling_qwen3sa.py, belongs beside it{copied}"
    kind = family(arch)
    return f"a {kind} model" + (": load it with trust_remote_code=True" if kind == OWN_MODEL_TYPE else "") + copied


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.output.exists():
            raise UsageError(f"--output {args.output} exists: choose another or remove it")
        if args.command == "import" and args.seq_length is not None and args.seq_length < 1:
            raise UsageError(f"--seq-length {args.seq_length}: at least 1")
        if args.command == "export" and not (math.isfinite(args.shard_gigabytes) and args.shard_gigabytes > 0):
            raise UsageError(f"--shard-gigabytes {args.shard_gigabytes:g}: a number above 0")
        if not args.input.is_dir():
            raise UsageError(f"--input {args.input} is no folder")
        defaults = prepare_platform(["--trust-checkpoint"] * args.trust_checkpoint)
        from megatron_ksa.training.arguments import install_arguments

        with (
            install_arguments(defaults),
            exclusive(args.output, "tools/convert_checkpoint.py"),
            whole_folder(args.output) as made,
        ):
            message = (run_import if args.command == "import" else run_export)(args, made)
        print(f"{args.output}: {message}")


if __name__ == "__main__":
    main()
