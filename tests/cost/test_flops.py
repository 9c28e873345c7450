"""The FLOPs that the trainer reports."""

import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.cost.flops import ksa_flops, visible_pairs
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.reference import text_attention


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 10))
def test_visible_pairs_counts_what_attention_sees(chunk_size, summary_tokens, window_chunks, chunks):
    """With zero keys and values of one, exp(log-sum-exp) of a query is the number of keys that it sees."""
    n = chunks * chunk_size
    geometry = KSAGeometry(chunk_size, summary_tokens, window_chunks)
    text, summaries = torch.zeros(1, n, 1, 1), torch.zeros(1, chunks * summary_tokens, 1, 1)
    _, lse = text_attention(text, text, text, summaries, summaries, geometry)
    own = chunks * (summary_tokens * chunk_size + summary_tokens * (summary_tokens + 1) // 2)
    assert visible_pairs(n, chunk_size, summary_tokens, window_chunks) == round(lse.exp().sum().item()) + own


def dense(args, batch_size, squared=None, tokens=None):
    """A count of Megatron's form: layers linear in tokens and in squared lengths, and an output layer."""
    squared = batch_size * args.seq_length**2 if squared is None else squared
    tokens = batch_size * args.seq_length if tokens is None else tokens
    return args.num_layers * (100 * tokens + 3 * squared) + 1000 * tokens


def test_hybrid_model_counts_each_layer_kind():
    args = argparse.Namespace(num_layers=2, seq_length=16)
    ksa = KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="kf")
    flops = ksa_flops(dense, ksa)(args, 2)
    tokens, pairs = 32, visible_pairs(16, 4, 1, 1)
    expected = 1000 * tokens + (100 * tokens + 3 * 2 * 16**2) + (100 * tokens * 1.25 + 3 * 2 * pairs * 2)
    assert flops == pytest.approx(expected)


def test_full_attention_is_megatrons_count():
    args = argparse.Namespace(num_layers=2, seq_length=16)
    ksa = KSAConfig(enabled=True, chunk_size=4, layer_pattern="f")
    assert ksa_flops(dense, ksa)(args, 2) == pytest.approx(dense(args, 2))
