"""Sliding-window perplexity of a trained model at several context lengths, over the same scored tokens."""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

import installed  # noqa: F401
from common import add_model_arguments, indexed_documents, lengths, load, read_text, write_json

from megatron_ksa.data_tools.tokenizers import load_tokenizer, tokens_of
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_arguments(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-path", help="prefix of an indexed dataset")
    data.add_argument("--text", nargs="+", type=Path, help="text files, a document each (with --tokenizer-model)")
    parser.add_argument("--tokenizer-model", help="SentencePiece .model or folder with tokenizer.json, for --text")
    parser.add_argument("--concatenate", action="store_true", help="read all documents as one")
    parser.add_argument("--lengths", type=lengths, default="2k,4k,8k,16k,32k,64k,128k", help="context lengths, tokens")
    parser.add_argument("--stride", type=int, default=256, help="tokens scored a window")
    parser.add_argument("--windows", type=int, default=32, help="windows a length, spread over the data")
    return parser.parse_args()


def read_documents(args: argparse.Namespace) -> list[np.ndarray]:
    """The documents asked for."""
    if args.data_path:
        return indexed_documents(args.data_path, args.concatenate)
    if args.tokenizer_model is None:
        raise UsageError("--text needs --tokenizer-model")
    tokenizer = load_tokenizer(args.tokenizer_model)
    documents = [np.array(tokens_of(tokenizer, read_text(path, "--text"), f"--text {path}")) for path in args.text]
    return [np.concatenate(documents)] if args.concatenate else documents


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        for flag in ("stride", "windows"):
            if getattr(args, flag) < 1:
                raise UsageError(f"--{flag} {getattr(args, flag)}: at least 1")
        stored, model = load(args)
        from megatron_ksa.evaluation.perplexity import sliding_window_perplexity

        results = sliding_window_perplexity(
            model, read_documents(args), args.lengths, stride=args.stride, windows=args.windows
        )
        rows = [dataclasses.asdict(result) | {"perplexity": result.perplexity} for result in results]
        settings = {"checkpoint": str(stored.folder), "stride": args.stride}
        write_json(args.output, {"settings": settings, "results": rows})
        print(f"{'context':>9} {'perplexity':>11} {'loss':>8} {'std. error':>11} {'tokens':>8}")
        for result in results:
            print(
                f"{result.length:>9,} {result.perplexity:>11.3f} {result.loss:>8.4f} {result.standard_error:>11.4f} "
                f"{result.tokens:>8,}"
            )


if __name__ == "__main__":
    main()
