"""Look at what a trained KSA model reads in its summaries: one self-contained HTML page.

The text stands by chunks. Click on a chunk: the older chunks are shaded by the attention that it gives to their
summaries, in the layer and head chosen; bars show the shares of window, summaries and layers without summaries.
"""

import argparse
import sys
from pathlib import Path

try:
    from megatron_ksa.data_tools.tokenizers import load_tokenizer, tokens_of
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import LIST_BYTES, read_small, whole_file
from megatron_ksa.platform import prepare_platform

# Heads x chunks^2 / 2 bytes a layer: 256 chunks of 24 layers with 16 heads are 13 MB.
LIMIT = 4096


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, type=Path, help="folder that pretrain_gpt.py --save wrote")
    parser.add_argument("--iteration", type=int, help="iteration to load; the newest without it")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file to read")
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece .model or folder with tokenizer.json")
    parser.add_argument("--max-tokens", type=int, default=2048, help="read so many tokens of the text at most (2048)")
    parser.add_argument("--output", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--trust-checkpoint", action="store_true", help="load objects of any class, which can run code")
    return parser.parse_args()


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.output.suffix != ".html" or not args.output.parent.is_dir():
            raise UsageError(f"--output {args.output}: an .html file in a folder that exists")
        if not 1 <= args.max_tokens <= LIMIT:
            raise UsageError(f"--max-tokens {args.max_tokens}: from 1 to {LIMIT}")
        tokenizer = load_tokenizer(args.tokenizer_model)
        text = read_small(args.text, "--text", limit=LIST_BYTES)
        defaults = prepare_platform(["--trust-checkpoint"] * args.trust_checkpoint)
        import torch

        from megatron_ksa.checkpoint.load import find_checkpoint, load_model
        from megatron_ksa.evaluation.summary_attention import summary_attention
        from megatron_ksa.evaluation.summary_page import render

        stored = find_checkpoint(args.load, args.iteration)
        ksa = stored.settings.ksa
        if not ksa.has_summaries:
            raise UsageError(f"--load {args.load}: the model has no summaries")
        layers = ksa.layers(stored.args.num_layers, stored.args.seq_length)
        windows = sorted({layer.window_chunks for layer in layers if layer.kind == "k"})
        ids = tokens_of(tokenizer, text, f"--text {args.text}")[: args.max_tokens]
        ids = ids[: len(ids) // ksa.chunk_size * ksa.chunk_size]
        if len(ids) <= (min(windows, default=0) + 1) * ksa.chunk_size:
            raise UsageError(
                f"--text {args.text} has {len(ids)} tokens in whole chunks of {ksa.chunk_size}: with a window of "
                f"{min(windows, default=0)} chunks no summary is seen; more than "
                f"{(min(windows, default=0) + 1) * ksa.chunk_size} are needed"
            )
        if max(ids) >= stored.args.padded_vocab_size:
            raise UsageError(
                f"--tokenizer-model {args.tokenizer_model}: id {max(ids)} is beyond the model's vocabulary"
            )
        on_gpu = torch.cuda.is_available()
        model = load_model(stored, defaults, torch.bfloat16 if on_gpu else torch.float32)
        tokens = torch.tensor(ids, device="cuda" if on_gpu else "cpu")
        found = summary_attention(model, layers, tokens)
        texts = [tokenizer.decode(ids[at : at + ksa.chunk_size]) for at in range(0, len(ids), ksa.chunk_size)]
        facts = {
            "checkpoint": f"{args.load}, iteration {stored.iteration}",
            "text": str(args.text),
            "tokens": f"{len(ids):,}",
            "tokens in a chunk": str(ksa.chunk_size),
            "summary tokens": str(ksa.summary_tokens),
            "window": " and ".join(map(str, windows)) + " chunks",
            "layers": "".join(layer.kind for layer in layers),
        }
        with whole_file(args.output) as stream:
            stream.write(render("Attention on summaries", texts, found, list(facts.items())))
        print(f"{args.output}: {len(texts)} chunks, {len(layers)} layers")


if __name__ == "__main__":
    main()
