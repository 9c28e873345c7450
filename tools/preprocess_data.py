"""Tokenise JSONL, Parquet or folders of text into an indexed dataset that `pretrain_gpt.py --data-path` reads.

Documents that are left out (empty ones, and bad ones with --skip-bad-lines) are listed in PREFIX.skipped.jsonl with
file, line and reason. Names of special tokens in a text stay text. Two runs cannot write one PREFIX at a time.
"""

import argparse
import sys

try:
    from megatron_ksa.data_tools.preprocess import MAX_DOCUMENT_BYTES, PreprocessSettings, preprocess
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.plain_encoding import changed_texts
from megatron_ksa.data_tools.readers import input_files, passed_over
from megatron_ksa.data_tools.released import SUFFIX
from megatron_ksa.data_tools.tokenizers import load_tokenizer
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True,
        help="files: JSONL (.jsonl, .json, which may also be one array, and both with .gz or .zst), Parquet, released "
        "KSA data (PREFIX.bin with PREFIX.bin.meta, cut after each end-of-document id, loss mask kept); or folders of "
        "text, .gz or .zst among it",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--tokenizer-model", required=True, help="SentencePiece .model, or a folder with tokenizer.json"
    )
    parser.add_argument(
        "--json-key", default="text", help="field of a JSON record, or column of a Parquet file, that holds the text"
    )
    parser.add_argument("--glob", default="**/*.txt", help="files of a folder that are documents")
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end-of-document id")
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes")
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out and list documents that cannot be read"
    )
    parser.add_argument(
        "--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES,
        help="a larger line, cell or file is a bad document; tokenising takes 40 to 200 times this in each worker",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return parser.parse_args()


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        for name, most in (("workers", 1024), ("max_document_bytes", 1 << 30)):
            if not 1 <= getattr(args, name) <= most:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1, at most {most:,}")
        files = input_files(args.input, args.glob, others=(SUFFIX,))
        if others := passed_over(args.input, files, args.glob):
            print(others)
        settings = PreprocessSettings(
            files=files,
            output_prefix=args.output_prefix,
            tokenizer_model=args.tokenizer_model,
            json_key=args.json_key,
            append_eod=not args.no_append_eod,
            workers=args.workers,
            skip_bad_lines=args.skip_bad_lines,
            overwrite=args.overwrite,
            max_document_bytes=args.max_document_bytes,
        )
        counts = preprocess(settings)
        tokenizer = load_tokenizer(args.tokenizer_model)
        if changed := changed_texts(tokenizer.encode_content, tokenizer.decode):
            print(f"note: this tokenizer changes texts: {changed}")
        unknown = f", {counts.unknown_tokens:,} of them unknown to the tokenizer" if counts.unknown_tokens else ""
        listed = f", listed in {counts.listed}" if counts.listed else ""
        print(
            f"{args.output_prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens{unknown}; "
            f"left out: {counts.empty:,} empty, {counts.bad:,} bad{listed}\n"
            f"train with: --data-path {args.output_prefix} {tokenizer.training_flags}"
        )


if __name__ == "__main__":
    main()
