"""Floating-point operations of a KSA model: what the trainer's TFLOP/s per GPU counts."""

import argparse
import copy
from collections.abc import Callable
from functools import lru_cache

from megatron_ksa.config.ksa import KSAConfig, LayerKind


@lru_cache
def visible_pairs(num_text: int, chunk_size: int, summary_tokens: int, window_chunks: int) -> int:
    """Query-key pairs of one KSA layer and one sequence (docs/ksa.md, "Visibility"), text and summary queries together.

    Args:
        num_text: n, a multiple of chunk_size.
    """
    pairs = 0
    within = chunk_size * (chunk_size + 1) // 2
    for chunk in range(num_text // chunk_size):
        near = min(chunk, window_chunks)
        pairs += within + near * chunk_size**2 + (chunk - near) * summary_tokens * chunk_size
        pairs += summary_tokens * chunk_size + summary_tokens * (summary_tokens + 1) // 2
    return pairs


def ksa_flops(dense: Callable, ksa: KSAConfig) -> Callable:
    """Megatron's `num_floating_point_operations` (`dense`) for a KSA model, with the same signature.

    Megatron's count is linear in the number of tokens and in the sum of squared lengths, two pairs to a squared token.
    KSA layers work on 1 + S/C rows a token and on the visible pairs; full layers and the output layer are unchanged.
    """

    def num_floating_point_operations(
        args: argparse.Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        tokens = total_real_tokens_in_batch or batch_size * args.seq_length
        # The count for twice the layers less that for the layers is what the layers alone cost. A model of 0 layers
        # would give the rest directly, but Megatron's pattern of MoE layers does not take it.
        twice = copy.copy(args)
        twice.num_layers = 2 * args.num_layers
        if isinstance(getattr(args, "moe_layer_freq", None), list):
            twice.moe_layer_freq = 2 * args.moe_layer_freq
        all_linear = dense(args, batch_size, 0, tokens)
        linear = (dense(twice, batch_size, 0, tokens) - all_linear) / args.num_layers
        output_layer = all_linear - linear * args.num_layers
        per_squared_token = dense(args, batch_size, 1, 0) / args.num_layers
        total = output_layer
        for layer in ksa.layers(args.num_layers, args.seq_length):
            if layer.kind == LayerKind.FULL:
                squared = seqlen_squared_sum_in_batch or batch_size * args.seq_length**2
                total += linear + per_squared_token * squared
            else:
                summary_tokens = ksa.summary_tokens * layer.has_summaries
                rows_per_token = 1 + summary_tokens / ksa.chunk_size
                pairs = visible_pairs(args.seq_length, ksa.chunk_size, summary_tokens, layer.window_chunks)
                total += linear * rows_per_token + per_squared_token * 2 * pairs * batch_size
        return total

    return num_floating_point_operations


def stage_flops(dense: Callable, ksa: Callable, *, train: str, distills: bool) -> Callable:
    """`num_floating_point_operations` of a stage: frozen weights have no gradients, and a teacher has a forward pass.

    Both counts are of forward pass, gradients of activations and gradients of weights, a third each. Of the small part
    that trains with `--ksa-train summary` the gradients of weights are left out.

    Args:
        dense: Megatron's count, of the model without summary rows.
        ksa: the KSA model's, as from `ksa_flops`.
        train: `summary` or `all`.
        distills: whether a teacher runs.
    """
    if train == "all" and not distills:
        return ksa

    def num_floating_point_operations(*args, **kwargs) -> float:
        student = ksa(*args, **kwargs) * (2 / 3 if train == "summary" else 1)
        return student + (dense(*args, **kwargs) / 3 if distills else 0)

    return num_floating_point_operations
