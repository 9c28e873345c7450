"""Needle tests of a trained model in RULER's eight forms: scores as JSON, and depth x length heat maps as PNG."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from common import add_model_arguments, lengths, load, load_for_decoding, read_text, stops_of, write_json
from tqdm import tqdm

from megatron_ksa.data_tools.tokenizers import known_text, load_tokenizer, tokens_of
from megatron_ksa.errors import UsageError, usage_errors_exit


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_arguments(parser, "; with --generate a Hugging Face folder too")
    parser.add_argument("--generate", action="store_true", help="let the model write its answers, greedily, in place "
                        "of one forward pass with the reference answer")  # fmt: skip
    parser.add_argument("--tokenizer-model", help="SentencePiece .model or folder with tokenizer.json; without it the "
                        "language of token ids that examples/harpe_extend trains small models on")  # fmt: skip
    parser.add_argument("--haystack", type=Path, help="text file of essays, with --tokenizer-model")
    parser.add_argument("--forms", nargs="+", default=["all"], help="forms, such as single_1 multikey_2, or all")
    parser.add_argument("--lengths", type=lengths, default="2k,4k,8k,16k,32k,64k,128k", help="context lengths, tokens")
    parser.add_argument("--depths", type=int, default=5, help="depths of the needle, evenly from start to end")
    parser.add_argument("--distances", type=lengths, help="tokens between needle and question, such as 64,1k, instead "
                        "of depths; a distance is left out of lengths that do not hold it")  # fmt: skip
    parser.add_argument("--cases", type=int, default=4, help="cases of each form, length and depth")
    parser.add_argument("--tokens-per-batch", type=int, default=65536, help="tokens of one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    return parser.parse_args()


def depths_at(length: int, args: argparse.Namespace) -> list[float]:
    """Depths of the needle, 0 (start) to 1 (end), at a context length."""
    if args.distances:
        return [1 - distance / length for distance in args.distances if distance < length]
    return [i / max(args.depths - 1, 1) for i in range(args.depths)]


def make_language(args: argparse.Namespace, vocab_size: int):
    """The language of the tests."""
    if args.tokenizer_model is None:
        from megatron_ksa.evaluation.token_language import VOCABULARY, TokenLanguage

        if vocab_size < VOCABULARY:
            raise UsageError(
                f"the language of token ids has {VOCABULARY} of them, the model knows {vocab_size}: give "
                "--tokenizer-model "
                "and --haystack"
            )
        return TokenLanguage()
    if args.haystack is None:
        raise UsageError("--tokenizer-model needs --haystack: a text file that essays are read from")
    from megatron_ksa.evaluation.text_language import TextLanguage

    tokenizer = load_tokenizer(args.tokenizer_model)
    encode = functools.partial(tokens_of, tokenizer, what="a prompt")
    return TextLanguage(encode, functools.partial(known_text, tokenizer), read_text(args.haystack, "--haystack"))


def load_model(args: argparse.Namespace):
    """The model's name in the results, the size of its vocabulary, and the model or its decoder."""
    if args.generate:
        stops = stops_of(load_tokenizer(args.tokenizer_model)) if args.tokenizer_model else []
        found = load_for_decoding(args, stops)
        return found.name, found.vocab_size, found.generate
    if (args.checkpoint / "config.json").is_file():
        raise UsageError(f"--checkpoint {args.checkpoint} is a Hugging Face folder: it needs --generate")
    stored, model = load(args)
    return str(stored.folder), model.vocab_size, model


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        for flag in ("depths", "cases", "tokens_per_batch"):
            if getattr(args, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
        if args.seed < 0:
            raise UsageError(f"--seed {args.seed}: 0 or more")
        name, vocab_size, model = load_model(args)
        from megatron_ksa.evaluation.needle import FORMS, evaluate, plot_heat_map

        forms = list(FORMS) if args.forms == ["all"] else list(dict.fromkeys(args.forms))
        for form in forms:
            if form not in FORMS:
                raise UsageError(f"--forms {form}: one of {', '.join(FORMS)}, or all")
        language = make_language(args, vocab_size)
        plan = [(form, length, depth) for length in args.lengths for form in forms for depth in depths_at(length, args)]
        if not plan:
            raise UsageError(f"--distances {max(args.distances)}: every distance exceeds the lengths {args.lengths}")
        scores = [
            evaluate(model, language, *cell, cases=args.cases, tokens_per_batch=args.tokens_per_batch, seed=args.seed)
            for cell in tqdm(plan, desc="needles", unit="cell")
        ]
        plot_heat_map(scores, args.output.with_suffix(".png"))
        settings = {"checkpoint": name, "generate": args.generate, "cases": args.cases, "seed": args.seed}
        write_json(args.output, {"settings": settings, "results": [dataclasses.asdict(score) for score in scores]})
        print(f"{'form':<12}" + "".join(f"{length:>9,}" for length in args.lengths))
        for form in forms:
            cells = [[s.values for s in scores if (s.form, s.length) == (form, length)] for length in args.lengths]
            print(f"{form:<12}" + "".join(f"{sum(cell) / len(cell):>9.1%}" for cell in cells))
        print(f"{args.output}, {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
