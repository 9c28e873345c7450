"""Repeat long documents of an indexed dataset until they hold a stated share of its tokens, for length extension."""

import argparse
import sys
from pathlib import Path

try:
    from megatron_ksa.data_tools.length_upsampling import upsample
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-path", required=True, help="prefix of the indexed dataset to read")
    parser.add_argument(
        "--output-prefix", required=True,
        help="writes PREFIX.bin and PREFIX.idx, and the loss mask of --data-path where it has one",
    )  # fmt: skip
    parser.add_argument("--threshold", type=int, default=4096, help="documents of more tokens are long")
    parser.add_argument(
        "--share", type=float, required=True, help="of all tokens that long documents shall hold, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return parser.parse_args()


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if Path(args.data_path).resolve() == Path(args.output_prefix).resolve():
            raise UsageError(f"--output-prefix {args.output_prefix} is --data-path: choose another")
        for name, most in (("threshold", 1 << 31), ("seed", (1 << 63) - 1)):
            if not 0 <= getattr(args, name) <= most:
                raise UsageError(f"--{name} {getattr(args, name)}: at least 0, at most {most:,}")
        counts = upsample(
            args.data_path, args.output_prefix, args.threshold, args.share, seed=args.seed, overwrite=args.overwrite
        )
        print(
            f"{args.output_prefix}: {counts.long_documents:,} of {counts.documents:,} documents exceed "
            f"{args.threshold:,} "
            f"tokens; they hold {counts.share_after:.1%} of {counts.tokens_after:,} tokens (before: "
            f"{counts.share_before:.1%} of "
            f"{counts.tokens:,})"
        )


if __name__ == "__main__":
    main()
