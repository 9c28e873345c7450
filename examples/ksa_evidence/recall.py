"""Recall across a window on a CPU: tiny models learn to look up key-value pairs that lie 40 tokens and more behind.

    python examples/ksa_evidence/recall.py --output runs/recall.json --patterns k w kkkf wwwf --seeds 0 1 2 --steps 250

A sequence has four pairs of key and value in its first half and asks for the same keys at its end. Four layers of width
96 with chunks of 4 and a window of 2 chunks are trained on 32 fresh sequences a step; the score is the share of the
questions of 512 more that are answered right, and chance is one in 28.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401

from megatron_ksa import KSAConfig, KSAGPTModel, activate_cpu_platform
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import cell, table
from megatron_ksa.results import Results

if TYPE_CHECKING:
    import torch

LAYERS, WIDTH, LENGTH, CHUNK, WINDOW = 4, 96, 96, 4, 2
PAIRS, BATCH, STEPS, LEARNING_RATE = 4, 32, 250, 1e-3
# Token 0 is filler; as many keys and values follow.
KIND = 28
CHANCE = 1 / KIND
# Padded to a multiple of 64.
WORDS = 64


def sequences(batch: int, generator: "torch.Generator") -> "torch.Tensor":
    """int64 [batch, LENGTH]: pairs of key and value in the first half, the same keys asked for at the end."""
    import torch

    tokens = torch.zeros(batch, LENGTH, dtype=torch.long)
    for row in tokens:
        keys = 1 + torch.randperm(KIND, generator=generator)[:PAIRS]
        values = 1 + KIND + torch.randint(KIND, (PAIRS,), generator=generator)
        places = CHUNK * torch.randperm(LENGTH // 2 // CHUNK, generator=generator)[:PAIRS]
        row[places], row[places + 1] = keys, values
        order = torch.randperm(PAIRS, generator=generator)
        row[LENGTH - 2 * PAIRS :: 2], row[LENGTH - 2 * PAIRS + 1 :: 2] = keys[order], values[order]
    return tokens


def build(pattern: str, seed: int) -> KSAGPTModel:
    """A model with random weights in float32; its layers are those of --ksa-layer-pattern."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ksa.checkpoint.load import single_process_groups

    groups = single_process_groups()
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=2 * WIDTH, num_attention_heads=4, kv_channels=WIDTH // 4,
        layernorm_epsilon=1e-6, normalization="RMSNorm", qk_layernorm=True, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True,
        transformer_impl="local", hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.05,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    ksa = KSAConfig(True, chunk_size=CHUNK, window_chunks=str(WINDOW), layer_pattern=pattern)
    return KSAGPTModel(config, ksa, LENGTH, vocab_size=WORDS, pg_collection=groups)


def recall(pattern: str, seed: int, steps: int = STEPS, learning_rate: float = LEARNING_RATE) -> float:
    """Share of questions answered right after training from scratch."""
    import torch

    model = build(pattern, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    generator = torch.Generator().manual_seed(seed)
    asked = range(LENGTH - 2 * PAIRS, LENGTH, 2)
    positions = torch.arange(LENGTH)
    for _ in range(steps):
        tokens = sequences(BATCH, generator)
        logits = model(tokens, positions.expand_as(tokens), None)
        loss = torch.nn.functional.cross_entropy(logits[:, asked].flatten(0, 1), tokens[:, 1:][:, asked].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tokens = sequences(512, generator)
        answers = model(tokens, positions.expand_as(tokens), None)[:, asked].argmax(-1)
    return (answers == tokens[:, 1:][:, asked]).float().mean().item()


def main() -> None:
    """Train each pattern at each seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON, added to")
    parser.add_argument("--patterns", nargs="+", default=["k", "w", "kkkf", "wwwf"], help="of one or four layer kinds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of 32 sequences ({STEPS})")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help=f"peak learning rate ({LEARNING_RATE:g})")
    args = parser.parse_args()
    with usage_errors_exit():
        if args.steps < 1 or not args.lr > 0:
            raise UsageError(f"--steps {args.steps} and --lr {args.lr:g}: at least one step, a rate above 0")
        activate_cpu_platform()
        results = Results(args.output, {"batch": BATCH}, ("pattern", "seed", "steps", "lr"))
        found: dict[str, list[float]] = {}
        for pattern in args.patterns:
            for seed in args.seeds:
                begin = time.process_time()
                score = recall(pattern, seed, args.steps, args.lr)
                found.setdefault(pattern, []).append(score)
                results.add({"pattern": pattern, "seed": seed, "steps": args.steps, "lr": args.lr, "recall": score,
                             "cpu_seconds": time.process_time() - begin})  # fmt: skip
                print(f"{pattern}, seed {seed}: {score:.1%} after {args.steps} steps", flush=True)
        rows = [[pattern, cell(scores, 100)] for pattern, scores in found.items()]
        print(table(["layers", f"answered (%), {len(args.seeds)} seeds, {args.steps} steps"], rows))


if __name__ == "__main__":
    main()
