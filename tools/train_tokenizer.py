"""Make a tokenizer: SentencePiece BPE trained on your text, or the byte-level one, which needs no training."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    from megatron_ksa.data_tools.preprocess import document_text
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.readers import BadDocument, input_files, read_documents
from megatron_ksa.data_tools.tokenizers import load_tokenizer, train_sentencepiece, write_byte_level
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--type", choices=("sentencepiece", "byte-level"), default="sentencepiece", help="kind of tokenizer"
    )
    parser.add_argument("--output", required=True, help="a .model file (sentencepiece) or a folder (byte-level)")
    parser.add_argument("--input", nargs="+", default=[], help="JSONL files or folders to train on")
    parser.add_argument("--glob", default="**/*.txt", help="files of a folder that are documents")
    parser.add_argument("--json-key", default="text", help="field of a JSONL record that holds the text")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces of the SentencePiece model")
    parser.add_argument(
        "--sample-megabytes", type=float, default=100.0, help="text to train on, from the start of the input"
    )
    return parser.parse_args()


def sample(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the input's documents up to the sample size; documents that cannot be read are passed over."""
    left = int(args.sample_megabytes * 1e6)
    for document in read_documents(input_files(args.input, args.glob)):
        try:
            text = document_text(document, args.json_key)
        except BadDocument:
            continue
        yield from text.splitlines()
        left -= len(document.payload)
        if left <= 0:
            return


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        output = Path(args.output)
        if output.exists():
            raise UsageError(f"--output {output} exists: choose another or remove it")
        output.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed, so that an interrupted run leaves no tokenizer.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tokenizer-") as folder:
            made = Path(folder) / "tokenizer"
            if args.type == "byte-level":
                write_byte_level(made)
            else:
                if not args.input:
                    raise UsageError("--type sentencepiece needs --input: JSONL files or folders to train on")
                if output.suffix != ".model":
                    raise UsageError(f"--output {output}: a SentencePiece model's name ends in .model")
                train_sentencepiece(sample(args), made, args.vocab_size, threads=os.cpu_count() or 1)
                made = made.with_suffix(".model")
            made.rename(output)
        tokenizer = load_tokenizer(args.output)
        print(f"{output}: {tokenizer.vocab_size} tokens; train with {tokenizer.training_flags}")


if __name__ == "__main__":
    main()
