"""Tokens a second of the experiment's models: forward and backward passes of each arm, alone on the device.

    python examples/ksa_evidence/speed.py --output runs/evidence/speed.json

All arms have the experiment's size; --batch-tokens are one forward pass, in sequences of each of --lengths tokens. The
optimizer, which is the same for all arms, is left out. The median of --passes passes counts, after three others.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from experiment import BASE, HEAD_DIM, SCRATCH

from megatron_ksa import KSAConfig, KSAGPTModel, activate_cpu_platform
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import table
from megatron_ksa.results import machine

WARM_UP = 3


def parse_arguments() -> argparse.Namespace:
    """The command line; sizes are the experiment's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of a forward pass")
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4")
    parser.add_argument("--heads", type=int, default=8, help="attention heads, of 64 channels")
    parser.add_argument("--window", type=int, default=8, help="W, past chunks of 8 tokens seen as text")
    parser.add_argument("--vocabulary", type=int, default=8192, help="words")
    parser.add_argument("--passes", type=int, default=20, help="passes whose median counts")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    args = parser.parse_args()
    if args.layers % 4:
        raise UsageError(f"--layers {args.layers}: a multiple of 4, for 3:1 hybrids")
    for length in args.lengths:
        if length % 8 or length < 8 or args.batch_tokens % length:
            raise UsageError(
                f"--lengths {length}: a multiple of 8 tokens that divides --batch-tokens {args.batch_tokens}"
            )
    if args.passes < 1:
        raise UsageError(f"--passes {args.passes}: at least 1")
    return args


def build(arm: str, length: int, args: argparse.Namespace) -> KSAGPTModel:
    """An arm's model with random weights, bf16 on a GPU; the full model is a dense one."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ksa.checkpoint.load import single_process_groups

    groups, on_gpu = single_process_groups(), torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden, layers = args.heads * HEAD_DIM, SCRATCH[arm]
    config = TransformerConfig(
        num_layers=args.layers, hidden_size=hidden, ffn_hidden_size=hidden * 8 // 3 // 64 * 64,
        num_attention_heads=args.heads, kv_channels=HEAD_DIM, normalization="RMSNorm", qk_layernorm=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=on_gpu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, transformer_impl="local", params_dtype=dtype,
        bf16=on_gpu, use_cpu_initialization=not on_gpu, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
    )  # fmt: skip
    pattern = layers if len(layers) == 1 else f"{layers}*{args.layers // len(layers)}"
    ksa = KSAConfig() if layers == "f" else KSAConfig(True, window_chunks=str(args.window), layer_pattern=pattern)
    # Equal bases are RoPE, and give the full model the attention of the others.
    model = KSAGPTModel(
        config, ksa, length, vocab_size=args.vocabulary, position_embedding_type="harpe",
        bases=(float(BASE),) * args.heads, pg_collection=groups,
    )  # fmt: skip
    return model.to("cuda" if on_gpu else "cpu", dtype)


def measure(arm: str, length: int, args: argparse.Namespace) -> dict:
    """The median pass of an arm at a length."""
    import torch

    model = build(arm, length, args)
    device = next(model.parameters()).device
    words = torch.randint(args.vocabulary, (args.batch_tokens // length, length + 1), device=device)
    tokens, labels = words[:, :-1], words[:, 1:]
    positions = torch.arange(length, device=device).expand_as(tokens)
    seconds = []
    for _ in range(WARM_UP + args.passes):
        model.zero_grad(set_to_none=True)
        _wait()
        begin = time.perf_counter()
        model(tokens, positions, None, labels=labels).float().mean().backward()
        _wait()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[WARM_UP:])
    return {"arm": arm, "length": length, "ms": median * 1e3, "tokens_per_second": args.batch_tokens / median}


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure all arms at all lengths, and print a table."""
    with usage_errors_exit():
        args = parse_arguments()
        activate_cpu_platform()
        runs = []
        for length in args.lengths:
            for arm in SCRATCH:
                runs.append(measure(arm, length, args))
                print(f"{length} tokens, {arm}: {runs[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
                with whole_file(args.output) as stream:
                    json.dump(
                        {"machine": machine(args.commit), "batch_tokens": args.batch_tokens, "runs": runs}, stream
                    )
        rates = {(run["arm"], run["length"]): run["tokens_per_second"] for run in runs}
        rows = [[arm, *(f"{rates[arm, length]:,.0f}" for length in args.lengths)] for arm in SCRATCH]
        print(table(["tokens/s", *(f"{length:,}" for length in args.lengths)], rows))


if __name__ == "__main__":
    main()
