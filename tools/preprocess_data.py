"""Tokenise JSONL files or folders of text into an indexed dataset that `pretrain_gpt.py --data-path` reads."""

import argparse
import sys

try:
    from megatron_ksa.data_tools.preprocess import PreprocessSettings, preprocess
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.readers import input_files
from megatron_ksa.data_tools.tokenizers import load_tokenizer
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files (.jsonl, .json, also .gz) or folders")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--tokenizer-model", required=True, help="SentencePiece .model, or a folder with tokenizer.json"
    )
    parser.add_argument("--json-key", default="text", help="field of a JSONL record that holds the text")
    parser.add_argument("--glob", default="**/*.txt", help="files of a folder that are documents")
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end-of-document id")
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes")
    parser.add_argument("--skip-bad-lines", action="store_true", help="count and skip documents that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return parser.parse_args()


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.workers < 1:
            raise UsageError(f"--workers {args.workers}: at least 1")
        settings = PreprocessSettings(
            files=input_files(args.input, args.glob),
            output_prefix=args.output_prefix,
            tokenizer_model=args.tokenizer_model,
            json_key=args.json_key,
            append_eod=not args.no_append_eod,
            workers=args.workers,
            skip_bad_lines=args.skip_bad_lines,
            overwrite=args.overwrite,
        )
        counts = preprocess(settings)
        print(
            f"{args.output_prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens; "
            f"left out: {counts.empty:,} empty, {counts.bad:,} bad\n"
            f"train with: --data-path {args.output_prefix} {load_tokenizer(args.tokenizer_model).training_flags}"
        )


if __name__ == "__main__":
    main()
