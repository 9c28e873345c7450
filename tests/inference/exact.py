"""What the tests of decoding compare: logits of a state, step by step, with the full forward's."""

import random

import torch
from compare import assert_close
from single_process import random_tokens

from megatron_ksa.inference.state import DecodingState


def full_logits(model, tokens):
    """[n, vocabulary] of one sequence, int64 [n]."""
    tokens = tokens.to(next(model.parameters()).device)
    with torch.no_grad():
        return model(tokens[None], torch.arange(len(tokens), device=tokens.device)[None])[0]


def agree(logits, expected):
    """The largest difference is below 1e-4, and the ratio of norms within the table's."""
    assert_close("logits", logits, expected)
    assert (logits - expected).abs().max() < 1e-4


def decode_at_random(model, lengths, max_batch, *, segment=7, seed=0, every_slot=False):
    """Sequences of these lengths join, go on and leave in a random order, logits compared with the full forward's.

    A sequence joins with a prompt of random length, in pieces, between the steps of the others; a step takes a random
    part of those that are there.
    """
    rng = random.Random(seed)
    waiting = [random_tokens(1, length, seed=index)[0] for index, length in enumerate(lengths)]
    expected = {id(tokens): full_logits(model, tokens) for tokens in waiting}
    running: dict[int, torch.Tensor] = {}
    with DecodingState(model, max_batch, max(lengths), segment, every_slot=every_slot) as state:
        while waiting or running:
            if waiting and len(running) < max_batch and rng.random() < 0.4:
                tokens = waiting.pop()
                slot = state.join()
                running[slot] = tokens
                first = rng.randint(1, len(tokens))
                agree(state.prefill(slot, tokens[:first]), expected[id(tokens)][first - 1])
            for slot in [s for s, tokens in running.items() if state.lengths[s] == len(tokens)]:
                del running[slot]
                state.leave(slot)
            if not running:
                continue
            slots = rng.sample(sorted(running), rng.randint(1, len(running)))
            if len(slots) == 1 and rng.random() < 0.3:
                slot, tokens = slots[0], running[slots[0]]
                at = state.lengths[slot]
                more = rng.randint(1, len(tokens) - at)
                agree(state.prefill(slot, tokens[at : at + more]), expected[id(tokens)][at + more - 1])
                continue
            at = [state.lengths[slot] for slot in slots]
            logits = state.decode(slots, torch.stack([running[s][i] for s, i in zip(slots, at, strict=True)]))
            for row, slot, i in zip(logits, slots, at, strict=True):
                agree(row, expected[id(running[slot])][i])
