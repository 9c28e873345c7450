"""Decoding on a CUDA device: steps captured in CUDA graphs, and the same text whatever else runs."""

import pytest
import torch
from exact import decode_at_random, full_logits
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.inference import DecodingState, Generator, Request, SamplingSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 0, 2]", layer_pattern="kklf")


def small_model(ksa, **changes):
    """Heads of 16 channels: what the kernels take in any dtype."""
    return build_model(ksa, transformer_config(kv_channels=16, **changes), bases=(1e4, 5e5)).cuda().eval()


@pytest.mark.parametrize("pattern", ["kklf", "wkwf", "f"])
def test_captured_steps_have_the_full_forwards_logits(pattern):
    """In float32; sequences join and leave between replays of the same two graphs."""
    ksa = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 0, 2]", layer_pattern=pattern, summary_tokens=2)
    decode_at_random(small_model(ksa), [41, 9, 1, 23, 30, 41], 3, every_slot=True)


def test_captured_steps_give_the_bits_of_launched_ones():
    model, tokens = small_model(KSA).bfloat16(), random_tokens(2, 40)
    found = []
    for cuda_graph in (True, False):
        with DecodingState(model, 2, 40, cuda_graph=cuda_graph) as state:
            slots = [state.join(), state.join()]
            for slot in slots:
                state.prefill(slot, tokens[slot, : 5 + slot])
            found.append(torch.stack([state.decode(slots, token) for token in tokens[:, 7:].T]))
    assert torch.equal(*found)


def test_same_text_whatever_else_runs():
    """In bf16, where another rounding would soon be another text."""
    model = small_model(KSA).bfloat16()
    requests = [
        Request(random_tokens(1, 3 + 5 * i, seed=i)[0].tolist(), SamplingSettings(temperature=1.5, seed=i))
        for i in range(6)
    ]
    generator = Generator(model, 4, 200)
    together = [each.tokens for each in generator.generate(requests)]
    assert together == [generator.generate([request])[0].tokens for request in requests]


def test_a_step_in_bf16_is_near_the_full_forward():
    model, tokens = small_model(KSA).bfloat16(), random_tokens(1, 60)[0]
    expected = full_logits(model, tokens).float()
    with DecodingState(model, 1, 60) as state:
        slot = state.join()
        logits = torch.cat([state.decode([slot], token) for token in tokens.split(1)])
    assert (logits - expected).norm() / expected.norm() < 0.05
