"""Generate text with a trained model: one prompt as it grows, or prompts from JSONL with continuous batching.

    python tools/generate.py --load checkpoints --prompt 'def main():' --temperature 0.7 --top-p 0.9
    python tools/generate.py --load Qwen3-4B-Base --input prompts.jsonl --output texts.jsonl --batch 16

--load is a folder of pretrain_gpt.py --save, whatever its parallel layout, or a Hugging Face folder. A line of the
input is an object with a "prompt"; temperature, top_k, top_p, seed, stop and max_new_tokens in it go before the flags.
The output has a line for each, in their order: {"index", "input": the object, "text", "finish", "prompt_tokens",
"new_tokens"}. A line that cannot run is reported there ("error") and on stderr; the others run, the exit code is 2.
Killed and started again with the same flags, the program goes on.
"""

import argparse
import hashlib
import logging
import os
import sys
import time
from pathlib import Path

try:
    from megatron_ksa.config.options import add_config_arguments, config_from_args
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from tqdm import tqdm

from megatron_ksa.config.options import OneLineParser
from megatron_ksa.config.sampling import SamplingSettings
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.locks import exclusive
from megatron_ksa.platform import prepare_platform


def parser() -> OneLineParser:
    """The command line."""
    options = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--load", required=True, type=Path, help="folder of a Megatron or Hugging Face checkpoint")
    options.add_argument("--iteration", type=int, help="iteration to load; the newest without it")
    options.add_argument("--prompt", help="text to go on with; written to stdout as it grows")
    options.add_argument("--input", type=Path, help="JSONL file of prompts")
    options.add_argument("--output", type=Path, help="JSONL file to write, with --input")
    options.add_argument("--prompt-field", default="prompt", help="field of a line that holds the prompt (prompt)")
    options.add_argument(
        "--tokenizer-model", help="SentencePiece .model or folder with tokenizer.json; the checkpoint's without it"
    )
    options.add_argument("--batch", type=int, default=8, help="sequences at a time (8)")
    options.add_argument("--max-length", type=int, help="tokens of the longest sequence, prompt and text; without it "
                         "what the prompts need, at most what the model was trained on")  # fmt: skip
    options.add_argument("--segment", type=int, default=4096, help="tokens of a prompt at a time (4096)")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; bfloat16 on a GPU, else float32"
    )
    options.add_argument(
        "--work", type=Path, help="folder for a copy of a Hugging Face checkpoint, which is removed (the system's)"
    )
    options.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel of a step on its own")
    options.add_argument(
        "--trust-checkpoint", action="store_true", help="load objects of any class, which can run code"
    )
    add_config_arguments(options, SamplingSettings, "", "sampling")
    return options


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if (args.prompt is None) == (args.input is None):
        raise UsageError("give --prompt or --input, one of them")
    if (args.input is None) != (args.output is None):
        raise UsageError("--input and --output go together: one of them is missing")
    if args.output is not None and args.output.exists():
        raise UsageError(f"--output {args.output} exists: choose another or remove it")
    if args.work is not None and not args.work.is_dir():
        raise UsageError(f"--work {args.work} is no folder")
    for flag in ("batch", "max_length", "segment"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")


def check_prompt(request, args: argparse.Namespace, loaded) -> None:
    """Refuse a prompt that cannot run, also one beyond what the model was trained on, unless the user asks for more.

    Raises:
        UsageError: with the numbers.
    """
    from megatron_ksa.inference.generator import check_request

    length, trained = len(request.prompt), loaded.trained_length
    if args.max_length is None and length >= trained:
        raise UsageError(
            f"the prompt has {length} tokens: the model was trained on sequences of {trained} "
            "(--max-length goes beyond)"
        )
    check_request(request, args.max_length or trained, loaded.model.vocab_size)


def make_generator(args: argparse.Namespace, loaded, requests: list):
    """A generator with room for these requests."""
    from megatron_ksa.inference import Generator

    longest = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    return Generator(
        loaded.model, min(args.batch, len(requests)), args.max_length or min(longest, loaded.trained_length),
        tokenizer=loaded.tokenizer, end_tokens=loaded.end_tokens, vocabulary=loaded.tokenizer.vocab_size,
        segment=args.segment, cuda_graph=not args.no_cuda_graph,
    )  # fmt: skip


def write_out(text: str) -> None:
    """Write text to stdout at once; a reader that has left, such as `head`, ends the program without a traceback."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def write_text(args: argparse.Namespace, loaded, sampling) -> None:
    """Go on with --prompt on stdout."""
    from megatron_ksa.data_tools.tokenizers import tokens_of
    from megatron_ksa.inference import Request

    request = Request(tokens_of(loaded.tokenizer, args.prompt, "the prompt"), sampling)
    check_prompt(request, args, loaded)
    generator = make_generator(args, loaded, [request])
    begin = time.perf_counter()
    (found,) = generator.as_completed([request], lambda index, text: write_out(text))
    seconds = time.perf_counter() - begin
    write_out("\n")
    print(
        f"{len(request.prompt)} prompt tokens, {len(found.tokens)} new ones in {seconds:.1f} s "
        f"({len(found.tokens) / seconds:.1f} a second), ended by {found.finish}",
        file=sys.stderr,
    )


def make_request(record, args: argparse.Namespace, loaded):
    """The request of a record.

    Raises:
        UsageError: it cannot run.
    """
    from megatron_ksa.data_tools.tokenizers import tokens_of
    from megatron_ksa.inference import Request

    if record.problem is not None:
        raise UsageError(record.problem)
    request = Request(tokens_of(loaded.tokenizer, record.prompt, "the prompt"), record.sampling)
    check_prompt(request, args, loaded)
    return request


def write_texts(args: argparse.Namespace, loaded, sampling, records: list) -> None:
    """Go on with the prompts of --input, into --output."""
    from megatron_ksa.inference.records import error_line, line, texts

    with open(args.input, "rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    # What a text depends on, but for the rounding of other batches.
    names = ("dtype", "prompt_field", "tokenizer_model", "max_length")
    header = {"load": loaded.name, "input": content, "sampling": repr(sampling)}
    header |= {name: getattr(args, name) for name in names}
    with texts(args.output, header) as found:
        runs, bad = [], 0
        for record in records:
            if record.index in found.done:
                continue
            try:
                runs.append((record, make_request(record, args, loaded)))
            except UsageError as error:
                bad += 1
                print(f"{record.origin}: {error}", file=sys.stderr)
                found.add(error_line(record, str(error)))
        new, never, begin = 0, 0, time.perf_counter()
        if runs:
            generator = make_generator(args, loaded, [request for _, request in runs])
            completions = generator.as_completed([request for _, request in runs])
            with tqdm(total=len(records), initial=len(records) - len(runs), unit="text", desc="generate") as bar:
                for completion in completions:
                    record, request = runs[completion.index]
                    found.add(line(record, request, completion))
                    new += len(completion.tokens)
                    never += bool(request.sampling.stop) and completion.finish != "stop"
                    bar.set_postfix_str(f"{new / (time.perf_counter() - begin):.0f} tokens/s", refresh=False)
                    bar.update()
    rate = new / (time.perf_counter() - begin)
    print(f"{args.output}: {len(records) - bad} texts, {new} new tokens in this run, {rate:.0f} a second")
    if never:
        print(f"no stop string came in {never} texts of this run", file=sys.stderr)
    if bad:
        raise UsageError(f'{bad} of {len(records)} records could not run: {args.output} has the reasons ("error")')


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parser().parse_args()
        check(args)
        sampling = config_from_args(SamplingSettings, args, "")
        # Before Megatron, which would write log lines to stdout, where the text goes.
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
        logging.getLogger("megatron_ksa").setLevel(logging.INFO)
        defaults = prepare_platform(["--trust-checkpoint"] * args.trust_checkpoint)
        from megatron_ksa.inference.loading import load
        from megatron_ksa.inference.records import read_records

        # Before the model, which takes longer.
        records = read_records(args.input, args.prompt_field, sampling) if args.input is not None else []
        loaded = load(
            args.load, defaults, iteration=args.iteration, dtype=args.dtype, tokenizer=args.tokenizer_model,
            work=args.work,
        )  # fmt: skip
        if args.prompt is not None:
            write_text(args, loaded, sampling)
            return
        with exclusive(args.output, "tools/generate.py"):
            write_texts(args, loaded, sampling, records)


if __name__ == "__main__":
    main()
