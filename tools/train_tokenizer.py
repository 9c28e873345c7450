"""Make a tokenizer: SentencePiece BPE trained on your text, or the byte-level one, which needs no training."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from megatron_ksa.data_tools.preprocess import MAX_DOCUMENT_BYTES, document_text
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.documents import BadDocument
from megatron_ksa.data_tools.readers import input_files, passed_over, read_documents
from megatron_ksa.data_tools.skipped import SkipLog
from megatron_ksa.data_tools.tokenizers import load_tokenizer, train_sentencepiece, write_byte_level
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_folder
from megatron_ksa.locks import exclusive


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--type", choices=("sentencepiece", "byte-level"), default="sentencepiece", help="kind of tokenizer"
    )
    parser.add_argument("--output", required=True, help="a .model file (sentencepiece) or a folder (byte-level)")
    parser.add_argument(
        "--input", nargs="+", default=[], help="files or folders to train on, as tools/preprocess_data.py reads them"
    )
    parser.add_argument("--glob", default="**/*.txt", help="files of a folder that are documents")
    parser.add_argument("--json-key", default="text", help="field of a JSONL record that holds the text")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces of the SentencePiece model")
    parser.add_argument(
        "--sample-megabytes", type=float, default=100.0, help="text to train on, from the start of the input"
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true",
        help="pass over documents that cannot be read, and list them in OUTPUT.skipped.jsonl",
    )  # fmt: skip
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        help="a larger line, cell or file is a bad document",
    )
    return parser.parse_args()


def sample(args: argparse.Namespace, skipped: SkipLog) -> Iterator[str]:
    """Lines of the input's documents up to the sample size.

    Raises:
        UsageError: a document that cannot be read, without --skip-bad-lines.
    """
    left = int(args.sample_megabytes * 1e6)
    files = input_files(args.input, args.glob)
    if others := passed_over(args.input, files, args.glob):
        print(others)
    for document in read_documents(files, max_bytes=args.max_document_bytes, text_column=args.json_key):
        try:
            text = document_text(document, args.json_key)
        except BadDocument as error:
            if not args.skip_bad_lines:
                raise UsageError(f"{document.origin}: {error}; mend it or pass --skip-bad-lines") from None
            skipped.add(document.origin, error.reason, error.detail)
            continue
        yield from text.splitlines()
        left -= len(document.content)
        if left <= 0:
            return


def check(args: argparse.Namespace) -> None:
    """Refuse flags that cannot work before the input is read."""
    if Path(args.output).exists():
        raise UsageError(f"--output {args.output} exists: choose another or remove it")
    for name, most in (("vocab_size", 10_000_000), ("max_document_bytes", 1 << 30)):
        if not 1 <= getattr(args, name) <= most:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1, at most {most:,}")
    if not (math.isfinite(args.sample_megabytes) and args.sample_megabytes > 0):
        raise UsageError(f"--sample-megabytes {args.sample_megabytes:g}: a number above 0")
    if args.type == "sentencepiece" and not args.input:
        raise UsageError("--type sentencepiece needs --input: JSONL files or folders to train on")
    if args.type == "sentencepiece" and not args.output.endswith(".model"):
        raise UsageError(f"--output {args.output}: a SentencePiece model's name ends in .model")


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        check(args)
        output = Path(args.output)
        with exclusive(output, "tools/train_tokenizer.py"), SkipLog(Path(f"{output}.skipped.jsonl")) as skipped:
            if args.type == "byte-level":
                with whole_folder(output) as folder:
                    write_byte_level(folder)
                    load_tokenizer(str(folder))  # a library may leave a file that is cut
            else:
                train_sentencepiece(
                    sample(args, skipped), output.with_suffix(""), args.vocab_size, threads=os.cpu_count() or 1
                )
        tokenizer = load_tokenizer(args.output)
        left_out = f"; {skipped}" if skipped.reasons else ""
        print(f"{output}: {tokenizer.vocab_size} tokens{left_out}; train with {tokenizer.training_flags}")


if __name__ == "__main__":
    main()
